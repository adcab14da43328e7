"""sacrebleu and rouge-score behind the interface of the package."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.evals.reports import libraries


@pytest.fixture(scope="module")
def sacrebleu():
    return pytest.importorskip("sacrebleu", reason="pip install -e .[eval]")


@pytest.fixture(scope="module")
def short(pairs):
    references, hypotheses = pairs
    return references[:120], hypotheses[:120]


def test_bleu_and_chrf(sacrebleu, short):
    references, hypotheses = short
    first = [own[0] for own in references]
    single = [[own] for own in first]
    bleu, chrf = libraries.bleu(single, hypotheses), libraries.chrf(single, hypotheses)
    assert bleu.corpus == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [first]).score / 100, rel=1e-12)
    assert chrf.corpus == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [first]).score / 100, rel=1e-12)
    expected = [
        sacrebleu.sentence_bleu(hypothesis, [one]).score / 100
        for hypothesis, one in zip(hypotheses, first, strict=True)
    ]
    np.testing.assert_allclose(bleu.items, expected, rtol=1e-12)
    assert bleu.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert chrf.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_sums_of_statistics_give_the_corpus_score(sacrebleu, short):
    """Items have one or two references."""
    statistics = libraries.bleu_statistics(*short)
    drawn = np.random.default_rng(1).integers(len(statistics), size=(2, 50))
    samples = libraries.bleu_value(statistics[drawn].sum(1))
    for indices, value in zip(drawn, samples, strict=True):
        references, hypotheses = ([side[i] for i in indices] for side in short)
        assert libraries.bleu(references, hypotheses).corpus == pytest.approx(value, rel=1e-12)


def test_lower_case_changes_score_and_signature(sacrebleu):
    pair = [["No Pleural Effusion is seen."]], ["no pleural effusion is seen."]
    mixed, lower = libraries.bleu(*pair), libraries.bleu(*pair, lowercase=True)
    assert lower.corpus == pytest.approx(1) and mixed.corpus < 0.7
    assert "case:lc" in lower.signature
    assert libraries.bleu_value(libraries.bleu_statistics(*pair, lowercase=True).sum(0)) == pytest.approx(1)


def test_rouge_golden_value():
    """A subsequence of 6 words, lengths 10 and 12, gives the published F1 of 0.5455."""
    pytest.importorskip("rouge_score", reason="pip install -e .[eval]")
    scored = libraries.rouge([["u a v b w c x d y e z f"], ["clear"]], ["a b c d e f 1 2 3 4", ""])
    assert scored["rougeL"].items[0] == pytest.approx(0.5455, abs=5e-5)
    assert scored["rougeL"].items[1] == 0
    assert scored["rougeL"].corpus == pytest.approx(scored["rougeL"].items[0] / 2)
    assert scored["rouge1"].signature.startswith("rouge1|f1|stemmer:no|rouge-score:")


def test_rouge_takes_the_best_reference():
    pytest.importorskip("rouge_score", reason="pip install -e .[eval]")
    both = libraries.rouge([["lungs are clear", "the heart is large"]], ["the heart is normal"])
    alone = libraries.rouge([["the heart is large"]], ["the heart is normal"])
    assert {kind: one.corpus for kind, one in both.items()} == {k: one.corpus for k, one in alone.items()}
    stemmed = libraries.rouge([["effusions"]], ["effusion"], stemmer=True)["rouge1"]
    assert stemmed.corpus == 1 and "stemmer:yes" in stemmed.signature


@pytest.mark.parametrize(
    "metric,missing",
    [
        (libraries.bleu, "sacrebleu"),
        (libraries.bleu_statistics, "sacrebleu"),
        (libraries.chrf, "sacrebleu"),
        (libraries.rouge, "rouge_score"),
    ],
)
def test_missing_package(metric, missing, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"needs {missing}.*pip install 'vilam3-jax\[eval\]'"):
        metric([["a"]], ["a"])


@pytest.mark.parametrize("metric", [libraries.bleu, libraries.chrf, libraries.rouge])
def test_wrong_items(metric):
    with pytest.raises(ValueError, match="1 items with references for 2 hyp"):
        metric([["a"]], ["a", "b"])
