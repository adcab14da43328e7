"""BLEU, ROUGE-L and CIDEr against pycocoevalcap on real reports, and against values worked out by hand."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.evals.reports import coco, ptb

SCORERS = ("bleu", "rouge", "cider")


@pytest.fixture(scope="module")
def upstream(tokenized_pairs):
    """Name → (corpus, items) of pycocoevalcap."""
    pytest.importorskip("pycocoevalcap", reason="pip install -e .[coco]")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, hypotheses = tokenized_pairs
    gold = dict(enumerate(references))
    guess = {i: [one] for i, one in enumerate(hypotheses)}
    with contextlib.redirect_stdout(io.StringIO()):
        scores = (scorer.compute_score(gold, guess) for scorer in (Bleu(4), Rouge(), Cider()))
        return dict(zip(SCORERS, scores, strict=True))


def test_bleu(tokenized_pairs, upstream):
    statistics = coco.bleu_statistics(*tokenized_pairs)
    corpus, items = upstream["bleu"]
    np.testing.assert_allclose(coco.bleu_value(statistics.sum(0)), corpus, rtol=0, atol=1e-12)
    np.testing.assert_allclose(coco.bleu_value(statistics), np.transpose(items), rtol=0, atol=1e-12)


def test_rouge_l(tokenized_pairs, upstream):
    scores = coco.rouge_l(*tokenized_pairs)
    corpus, items = upstream["rouge"]
    np.testing.assert_allclose(scores, items, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.mean(), corpus, rtol=0, atol=1e-12)
    assert 0.1 < corpus < 0.9


def test_cider(tokenized_pairs, upstream):
    scores = coco.cider(*tokenized_pairs)
    corpus, items = upstream["cider"]
    np.testing.assert_allclose(scores, items, rtol=0, atol=1e-9)
    np.testing.assert_allclose(scores.mean(), corpus, rtol=0, atol=1e-9)
    assert corpus > 0.1


def test_bleu_of_a_bootstrap_sample_is_that_of_the_repeated_items(tokenized_pairs):
    references, hypotheses = tokenized_pairs
    drawn = np.random.default_rng(0).integers(len(hypotheses), size=(3, 200))
    statistics = coco.bleu_statistics(references, hypotheses)
    sampled = coco.bleu_value(statistics[drawn].sum(1))
    assert sampled.shape == (3, 4)
    for indices, value in zip(drawn, sampled, strict=True):
        again = coco.bleu_statistics([references[i] for i in indices], [hypotheses[i] for i in indices])
        np.testing.assert_allclose(coco.bleu_value(again.sum(0)), value, rtol=1e-12)


def test_bleu_by_hand():
    """Hypothesis of 4 words, closest reference of 5: 3 of 4 words match, 1 of 3 bigrams."""
    references = [["the heart is not enlarged", "clear"]]
    statistics = coco.bleu_statistics(references, ["heart is enlarged now"])
    assert statistics.tolist() == [[4, 5, 4, 3, 2, 1, 3, 1, 0, 0]]
    one, two, three, four = coco.bleu_value(statistics[0])
    penalty = np.exp(1 - 5 / 4)
    np.testing.assert_allclose([one, two], penalty * np.asarray([3 / 4, (3 / 4 / 3) ** 0.5]), rtol=1e-8)
    assert three < 1e-4 and four < 1e-3


@pytest.mark.parametrize(
    "reference,hypothesis",
    [
        ("No pleural effusion.", "Pleural effusion."),
        ("Mild pulmonary edema.", "Severe pulmonary edema."),
        ("Mild cardiomegaly.", "The cardiac silhouette is mildly enlarged."),
    ],
)
def test_flips_score_zero(reference, hypothesis):
    """Published: BLEU is 0.00 for a flipped negation, a flipped severity, and a paraphrase."""
    flipped = coco.bleu_statistics([[ptb.joined(reference)]], [ptb.joined(hypothesis)])
    assert coco.bleu_value(flipped)[0, 3] < 0.005


def test_equal_texts():
    text = ptb.joined("The heart is not enlarged.")
    assert coco.bleu_value(coco.bleu_statistics([[text]], [text]))[0] == pytest.approx([1] * 4, abs=1e-8)
    assert coco.rouge_l([[text]], [text])[0] == 1
    assert coco.cider([[text], ["clear lungs"]], [text, "x"])[0] == pytest.approx(10)


def test_rouge_by_hand():
    """A subsequence of 6, lengths 10 and 12: precision 0.6, recall 0.5."""
    hypothesis = ["a", "b", "c", "d", "e", "f", "1", "2", "3", "4"]
    reference = ["u", "a", "v", "b", "w", "c", "x", "d", "y", "e", "z", "f"]
    assert coco.longest_common_subsequence(reference, hypothesis) == 6
    expected = (1 + 1.2**2) * 0.6 * 0.5 / (0.5 + 1.2**2 * 0.6)
    assert coco.rouge_l([[" ".join(reference)]], [" ".join(hypothesis)]) == pytest.approx(expected, rel=1e-12)


words = st.lists(st.sampled_from("abcd"), max_size=40)


@given(words, words)
def test_longest_common_subsequence_is_that_of_the_table(first, second):
    lengths = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            lengths[i + 1][j + 1] = (
                lengths[i][j] + 1 if one == other else max(lengths[i][j + 1], lengths[i + 1][j])
            )
    assert coco.longest_common_subsequence(first, second) == lengths[-1][-1]


def test_empty_hypotheses_score_zero():
    references = [["heart normal"], ["lungs clear"]]
    assert not coco.bleu_value(coco.bleu_statistics(references, ["", ""])).any()
    assert not coco.rouge_l(references, ["", ""]).any()
    assert not coco.cider(references, ["", ""]).any()


@pytest.mark.parametrize("metric", [coco.bleu_statistics, coco.rouge_l, coco.cider])
def test_wrong_items(metric):
    with pytest.raises(ValueError, match="2 items with references for 1 hyp"):
        metric([["a"], ["b"]], ["a"])
    with pytest.raises(ValueError, match=r"items without references: \[1\]"):
        metric([["a"], []], ["a", "b"])
