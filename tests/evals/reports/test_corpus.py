"""Properties of predictions, and the constant report."""

from __future__ import annotations

import pytest

from vilam3_jax.evals.reports import coco, corpus, ptb


def test_properties():
    found = corpus.properties(["Clear lungs.", "", "clear lungs", "Large heart.", " . ", "Clear  lungs."])
    assert found == corpus.Properties(6, (1, 4), 2, 0.5, "Clear lungs.", 0.5)
    assert corpus.properties(["", ""]).distinct_ratio == 0
    with pytest.raises(ValueError, match="no predictions"):
        corpus.properties([])


def test_constant_report(findings):
    constant = corpus.constant_report(findings[:1500])
    scored = corpus.properties([constant] * 3)
    assert scored.distinct == 1 and not scored.empty
    references = [[ptb.joined(one)] for one in findings[1500:1700]]
    constant_scores = coco.rouge_l(references, [ptb.joined(constant)] * 200)
    rare = coco.rouge_l(references, ["pneumothorax"] * 200)
    assert constant_scores.mean() > 0.25 > rare.mean()
    assert corpus.constant_report(["", "", "A b.", "Clear.", "clear"]) == "Clear."
    with pytest.raises(ValueError, match="no training report"):
        corpus.constant_report(["", "."])
