"""The Java variant against the Python one on untokenized reports."""

from __future__ import annotations

import numpy as np
import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.evals.reports import coco, coco_java, ptb


def test_python_equals_java(pairs, java):
    references, hypotheses = ([*side[:90], *side[:90]] for side in pairs)
    references[0] = [references[0][0].replace(". ", ".\n"), *references[0][1:]]
    found = coco_java.scores(references, hypotheses)
    tokens = [[ptb.joined(one) for one in own] for own in references], [ptb.joined(one) for one in hypotheses]
    statistics = coco.bleu_statistics(*tokens)
    bleu, rouge, cider, meteor = (found[name] for name in coco_java.METRICS)
    np.testing.assert_allclose(coco.bleu_value(statistics.sum(0)), bleu[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(coco.bleu_value(statistics), bleu[1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(coco.rouge_l(*tokens), rouge[1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(coco.cider(*tokens), cider[1], rtol=0, atol=1e-9)
    assert 0.1 < meteor[0] < 1 and meteor[1].shape == (180,)
    exact = [i for i, (own, guess) in enumerate(zip(references, hypotheses, strict=True)) if guess in own]
    assert meteor[1][exact].min() > 0.95


def test_no_java(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"need java.*apt-get install openjdk.*vilam3_jax.evals.reports.coco"):
        coco_java.scores([["a"]], ["a"])


def test_no_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.tokenizer.ptbtokenizer", None)
    with pytest.raises(UserError, match=r"needs pycocoevalcap.*vilam3-jax\[coco\]"):
        coco_java.scores([["a"]], ["a"])


def test_unknown_metric():
    with pytest.raises(UserError, match=r"unknown metrics \['spice'\]"):
        coco_java.scores([["a"]], ["a"], ["bleu", "spice"])
