"""BLEU-1 to BLEU-4, ROUGE-L and CIDEr as pycocoevalcap 1.2 computes them, without Java.

Texts are tokens joined by single spaces (`ptb.tokenize`). Every item has one or more references and one
hypothesis. BLEU comes as *statistics*, float64 [n, k], and as the *value* of their sums [..., k]: one row
gives the score of an item, the sum of all rows that of the corpus, and the sum over a bootstrap sample of
patients that of the sample. The corpus scores of ROUGE-L and CIDEr are the means over the items.

Where these differ from other implementations: BLEU adds 1e-15 to matches and 1e-9 to counts instead of
smoothing, and compares lengths with the closest reference; ROUGE-L weighs recall with beta = 1.2; CIDEr
clips, and measures length in bigrams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from vilam3_jax.evals.reports.pairs import check

ORDERS = 4
BLEU_COLUMNS = (
    "hypothesis_length",
    "reference_length",
    *(f"total_{n}" for n in range(1, ORDERS + 1)),
    *(f"matched_{n}" for n in range(1, ORDERS + 1)),
)
_TINY, _SMALL = 1e-15, 1e-9
_BETA = 1.2
_SIGMA = 6.0

NGrams = tuple[Counter[tuple[str, ...]], ...]


def bleu_statistics(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """Float64 [n, 10], one row per item, columns `BLEU_COLUMNS`.

    A match is clipped at the largest count in any reference (Papineni et al., 2002, section 2.1); the
    reference length is the closest to the hypothesis's, and the shorter of two equally close ones.

    Raises:
      ValueError: different numbers of items, or an item without references.
    """
    check(references, hypotheses)
    rows = np.zeros((len(hypotheses), len(BLEU_COLUMNS)))
    for row, own, hypothesis in zip(rows, references, hypotheses, strict=True):
        words = hypothesis.split()
        split = [reference.split() for reference in own]
        row[0] = len(words)
        row[1] = min((abs(len(one) - len(words)), len(one)) for one in split)[1]
        counted = [ngrams(one) for one in split]
        for order, counts in enumerate(ngrams(words)):
            row[2 + order] = max(0, len(words) - order)
            row[2 + ORDERS + order] = sum(
                min(count, max(one[order][ngram] for one in counted)) for ngram, count in counts.items()
            )
    return rows


def bleu_value(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4, float64 [..., 4], of sums [..., 10] of the rows of `bleu_statistics`."""
    sums = np.asarray(sums, np.float64)
    totals, matched = sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]
    products = np.cumprod((matched + _TINY) / (totals + _SMALL), axis=-1)
    means = products ** (1 / np.arange(1, ORDERS + 1))
    ratio = (sums[..., 0] + _TINY) / (sums[..., 1] + _SMALL)
    return means * np.exp(np.minimum(1 - 1 / ratio, 0))[..., None]


def rouge_l(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """ROUGE-L of each item, float64 [n]: F of the longest common subsequence, with beta = 1.2.

    Lin, 2004, equation 4, with the best precision and the best recall over the references, which may come
    from different ones. An empty hypothesis with an empty reference scores 1, as in the original.

    Raises:
      ValueError: different numbers of items, or an item without references.
    """
    check(references, hypotheses)
    return np.asarray(
        [_rouge_l(own, hypothesis) for own, hypothesis in zip(references, hypotheses, strict=True)],
        np.float64,
    )


def _rouge_l(references: Sequence[str], hypothesis: str) -> float:
    words = hypothesis.split(" ")  # an empty text is one empty word
    common = [
        (longest_common_subsequence(one, words), len(one)) for one in (r.split(" ") for r in references)
    ]
    precision = max(length / len(words) for length, _ in common)
    recall = max(length / size for length, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one addition of large integers per word of `second`.

    Bit-parallel row update of Hyyrö, 2004: a zero bit of `row` is an increase along `first`.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches) | (row - matches)
    return len(first) - (row & everything).bit_count()


def cider(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """CIDEr-D of each item, float64 [n], between 0 and 10.

    Vedantam et al., 2015, section 3 and 5. The document frequencies are those of the references given, so the
    score of an item depends on the others; a bootstrap keeps them fixed. One item alone scores 0.

    Raises:
      ValueError: different numbers of items, or an item without references.
    """
    check(references, hypotheses)
    counted = [[ngrams(reference.split()) for reference in own] for own in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for own in counted:
        frequency.update({ngram for one in own for counts in one for ngram in counts})
    unseen = math.log(max(len(hypotheses), 1))
    rarity = {ngram: unseen - math.log(count) for ngram, count in frequency.items()}
    scores = np.zeros(len(hypotheses))
    for index, (own, hypothesis) in enumerate(zip(counted, hypotheses, strict=True)):
        vectors = _weighted(ngrams(hypothesis.split()), rarity, unseen)
        total = sum(_similarity(vectors, _weighted(one, rarity, unseen)) for one in own)
        scores[index] = 10 * total / len(own)
    return scores


# Weights of each order, their norms, and the number of bigrams.
_Vectors = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def _weighted(counts: NGrams, rarity: dict[tuple[str, ...], float], unseen: float) -> _Vectors:
    weights = [{ngram: n * rarity.get(ngram, unseen) for ngram, n in order.items()} for order in counts]
    norms = [sum(weight * weight for weight in order.values()) ** 0.5 for order in weights]
    return weights, norms, counts[1].total()


def _similarity(hypothesis: _Vectors, reference: _Vectors) -> float:
    """Mean over the orders of the clipped cosine similarity, damped by the difference in length."""
    total = 0.0
    for own, other, norm, other_norm in zip(
        hypothesis[0], reference[0], hypothesis[1], reference[1], strict=True
    ):
        if norm and other_norm:
            product = sum(
                min(weight, other[ngram]) * other[ngram] for ngram, weight in own.items() if ngram in other
            )
            total += product / (norm * other_norm)
    return total / ORDERS * math.exp(-((hypothesis[2] - reference[2]) ** 2) / (2 * _SIGMA**2))


def ngrams(words: Sequence[str]) -> NGrams:
    """Counts of the n-grams of order 1 to 4."""
    return tuple(
        Counter(zip(*(words[skip:] for skip in range(n)), strict=False)) for n in range(1, ORDERS + 1)
    )
