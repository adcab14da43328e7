"""Errors of numbers.

An answer that is not a number of the item's range has the largest error that a number of the range could
have. So no answer is worse than a wrong number, none is left out, and none is counted as a number that nobody
said. Without a range, the metric is undefined as soon as one answer is unparsed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vilam3_jax.evals.metrics.base import AdditiveMetric, Row, ratio, register


def error_of(row: Row) -> float:
    """Absolute error in the unit of the item; the largest possible one if the answer is unparsed.

    NaN if that is unknown, because `answer_spec` lacks `minimum` or `maximum`.
    """
    gold, parsed, spec = float(row["gold"]), row["parsed"], row.get("answer_spec") or {}
    if parsed is not None:
        return abs(float(parsed) - gold)
    if spec.get("minimum") is None or spec.get("maximum") is None:
        return math.nan
    return max(gold - float(spec["minimum"]), float(spec["maximum"]) - gold)


def _flare_error(row: Row) -> float:
    """Absolute error; an answer that is not a number counts as 0, as in FLARE26's `evaluate.py`."""
    return abs(float(row["parsed"] or 0.0) - float(row["gold"]))


def _errors(error: Callable[[Row], float], power: int) -> Callable[[Sequence[Row]], np.ndarray]:
    def statistics(rows: Sequence[Row]) -> np.ndarray:
        found = np.asarray([error(row) for row in rows], np.float64)
        return np.stack([found**power, np.ones(len(rows))], axis=1)

    return statistics


def _root(sums: np.ndarray) -> np.ndarray:
    return np.sqrt(ratio(sums))


register(AdditiveMetric("mae", _errors(error_of, 1), ratio, higher_is_better=False))
register(AdditiveMetric("rmse", _errors(error_of, 2), _root, higher_is_better=False))
register(AdditiveMetric("flare_mae", _errors(_flare_error, 1), ratio, higher_is_better=False))
register(AdditiveMetric("flare_rmse", _errors(_flare_error, 2), _root, higher_is_better=False))
