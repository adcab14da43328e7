"""BLEU and chrF of sacrebleu, and ROUGE-1, ROUGE-2 and ROUGE-L of rouge-score: the extra `eval`.

Texts are untokenized. All scores lie between 0 and 1; sacrebleu itself prints percentages. Each result
carries a signature, which belongs beside the figure: other settings make another metric of the same name.
These are not the BLEU and ROUGE-L of VILA-M3's tables, which are those of `coco`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np

from vilam3_jax.evals.reports.optional import package
from vilam3_jax.evals.reports.pairs import check

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of a library.

    Attributes:
      corpus: score of the corpus. It is not the mean of the items for BLEU and chrF.
      items: float64 [n], score of each item.
      signature: settings and version.
    """

    corpus: float
    items: np.ndarray
    signature: str


def bleu(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], *, lowercase: bool = False
) -> Scored:
    """BLEU-4 of sacrebleu, tokenizer `13a`, exponential smoothing; items with the effective order.

    Raises:
      UserError: sacrebleu is not installed.
      ValueError: different numbers of items, or an item without references.
    """
    metrics = package("sacrebleu.metrics", "eval", "BLEU of sacrebleu")
    corpus = metrics.BLEU(lowercase=lowercase)
    items = metrics.BLEU(lowercase=lowercase, effective_order=True)
    return _scored(corpus, items, references, hypotheses)


def bleu_statistics(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], *, lowercase: bool = False
) -> np.ndarray:
    """Float64 [n, 10] of `bleu`: hypothesis and reference lengths, total and matched n-grams of order 1 to 4.

    Raises:
      UserError: sacrebleu is not installed.
      ValueError: different numbers of items, or an item without references.
    """
    check(references, hypotheses)
    metric = package("sacrebleu.metrics", "eval", "BLEU of sacrebleu").BLEU(lowercase=lowercase)
    rows = np.zeros((len(hypotheses), 10))
    for row, own, hypothesis in zip(rows, references, hypotheses, strict=True):
        score = metric.corpus_score([hypothesis], [[one] for one in own])
        row[:] = [score.sys_len, score.ref_len, *score.totals, *score.counts]
    return rows


def bleu_value(sums: np.ndarray) -> np.ndarray:
    """BLEU-4, float64 [...], of sums [..., 10] of the rows of `bleu_statistics`.

    Raises:
      UserError: sacrebleu is not installed.
    """
    compute = package("sacrebleu.metrics", "eval", "BLEU of sacrebleu").BLEU.compute_bleu
    sums = np.asarray(sums, np.float64)
    values = [
        compute([int(n) for n in row[6:]], [int(n) for n in row[2:6]], int(row[0]), int(row[1])).score / 100
        for row in sums.reshape(-1, 10)
    ]
    return np.asarray(values, np.float64).reshape(sums.shape[:-1])


def chrf(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Scored:
    """chrF2 of sacrebleu: character n-grams of order 1 to 6, beta = 2.

    Raises:
      UserError: sacrebleu is not installed.
      ValueError: different numbers of items, or an item without references.
    """
    metrics = package("sacrebleu.metrics", "eval", "chrF")
    return _scored(metrics.CHRF(), metrics.CHRF(), references, hypotheses)


def rouge(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], *, stemmer: bool = False
) -> dict[str, Scored]:
    """F1 of `ROUGE_TYPES` of rouge-score, the best over the references; the corpus score is the mean.

    Raises:
      UserError: rouge-score is not installed.
      ValueError: different numbers of items, or an item without references.
    """
    check(references, hypotheses)
    scorer = package("rouge_score.rouge_scorer", "eval", "ROUGE-1, ROUGE-2 and ROUGE-L").RougeScorer(
        ROUGE_TYPES, use_stemmer=stemmer
    )
    scores = [scorer.score_multi(own, guess) for own, guess in zip(references, hypotheses, strict=True)]
    version = importlib.metadata.version("rouge-score")
    found = {}
    for kind in ROUGE_TYPES:
        items = np.asarray([one[kind].fmeasure for one in scores], np.float64)
        signature = f"{kind}|f1|stemmer:{'yes' if stemmer else 'no'}|rouge-score:{version}"
        found[kind] = Scored(float(items.mean()) if len(items) else float("nan"), items, signature)
    return found


def _scored(
    corpus: Any, items: Any, references: Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> Scored:
    check(references, hypotheses)
    most = max((len(own) for own in references), default=0)
    streams = [[own[k] if k < len(own) else None for own in references] for k in range(most)]
    score = corpus.corpus_score(list(hypotheses), streams).score / 100 if hypotheses else float("nan")
    each = [
        items.sentence_score(hypothesis, list(own)).score / 100
        for own, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return Scored(score, np.asarray(each, np.float64), str(corpus.get_signature()))
