"""Metrics of generated reports: rows whose `parsed` and `gold` are texts. An unparsed report is an empty one.

All are those of `vilam3_jax.evals.reports.coco`, as pycocoevalcap computes them. In a bootstrap, the document
frequencies of CIDEr stay those of all reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vilam3_jax.evals.metrics.base import AdditiveMetric, Row, ratio, register
from vilam3_jax.evals.reports import coco, ptb

_Score = Callable[[Sequence[Sequence[str]], Sequence[str]], np.ndarray]


def _pairs(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    return (
        [[ptb.joined(str(row["gold"]))] for row in rows],
        [ptb.joined(str(row["parsed"] or "")) for row in rows],
    )


def _bleu(order: int) -> AdditiveMetric:
    return AdditiveMetric(
        f"bleu_{order}",
        lambda rows: coco.bleu_statistics(*_pairs(rows)),
        lambda sums: coco.bleu_value(sums)[..., order - 1],
    )


def _mean(name: str, score: _Score) -> AdditiveMetric:
    def statistics(rows: Sequence[Row]) -> np.ndarray:
        return np.stack([score(*_pairs(rows)), np.ones(len(rows))], axis=1)

    return AdditiveMetric(name, statistics, ratio)


def _share_of_distinct() -> AdditiveMetric:
    """Distinct reports over all reports; a resample counts each report with the first row that holds it."""

    def statistics(rows: Sequence[Row]) -> np.ndarray:
        seen: set[str] = set()
        first = []
        for row in rows:
            text = str(row["output"]).strip()
            first.append(float(text not in seen))
            seen.add(text)
        return np.stack([np.asarray(first), np.ones(len(rows))], axis=1)

    return AdditiveMetric("distinct_reports", statistics, ratio)


for _order in range(1, coco.ORDERS + 1):
    register(_bleu(_order))
register(_mean("rouge_l", coco.rouge_l))
register(_mean("cider", coco.cider))
register(_share_of_distinct())
