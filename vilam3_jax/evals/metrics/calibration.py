"""Calibration of probabilities: rows with `probabilities` (option ↦ p) and the right option `gold`.

A *confidence* is the probability of the likeliest option. Temperature scaling (Guo et al., 2017, section 4.2)
is fitted on one half of the patients and applied to the other, and the other way round, so that no patient's
answers calibrate themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from vilam3_jax.evals.metrics.base import AdditiveMetric, Resampled, Row, WeightedMetric, ratio, register

BINS = 15
_TINY = 1e-12
_LOG_TEMPERATURES = (-3.0, 4.0)

_Probabilities = Callable[[Sequence[Row]], list[np.ndarray]]  # of the options of each row


def probabilities_of(rows: Sequence[Row]) -> list[np.ndarray]:
    """Probabilities of each row's options, float64 [options], in their order."""
    return [np.asarray([row["probabilities"][option] for option in row["options"]]) for row in rows]


def scaled_probabilities(rows: Sequence[Row]) -> list[np.ndarray]:
    """The same after temperature scaling, cross-fitted over two halves of the patients."""
    raw = probabilities_of(rows)
    halves = np.asarray([hashlib.sha256(str(row["cluster"]).encode()).digest()[0] % 2 for row in rows])
    right = _right(rows)
    scaled = list(raw)
    for half in (0, 1):
        fitted_on = np.flatnonzero(halves != half)
        temperature = (
            fit_temperature([raw[i] for i in fitted_on], right[fitted_on]) if len(fitted_on) else 1.0
        )
        for i in np.flatnonzero(halves == half):
            scaled[i] = scale(raw[i], temperature)
    return scaled


def scale(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of log-probabilities over a temperature, float64 [options]."""
    logits = np.log(probabilities + _TINY) / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def fit_temperature(probabilities: Sequence[np.ndarray], right: np.ndarray) -> float:
    """The temperature with the least mean negative log-likelihood.

    Args:
      probabilities: [n], of the options of each row.
      right: int [n], the position of the right option.
    """

    def loss(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        chosen = [scale(p, temperature)[i] for p, i in zip(probabilities, right, strict=True)]
        return -float(np.log(np.asarray(chosen) + _TINY).mean())

    found: Any = minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded")
    return float(np.exp(found.x))


def _right(rows: Sequence[Row]) -> np.ndarray:
    return np.asarray([list(row["options"]).index(row["gold"]) for row in rows])


def _confidence(rows: Sequence[Row], found: _Probabilities) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and correctness of each row, float64 [n] each."""
    probabilities = found(rows)
    confidence = np.asarray([float(p.max()) for p in probabilities])
    correct = np.asarray([float(p.argmax() == i) for p, i in zip(probabilities, _right(rows), strict=True)])
    return confidence, correct


def _ece(name: str, found: _Probabilities) -> WeightedMetric:
    def prepare(rows: Sequence[Row]) -> Resampled:
        confidence, correct = _confidence(rows, found)
        # Bins of equal mass over the rows as answered; a resample keeps them.
        order = np.argsort(confidence, kind="stable")
        bins = np.empty(len(rows), np.int64)
        bins[order] = np.arange(len(rows)) * BINS // len(rows)
        members = (bins == np.arange(BINS)[:, None]).astype(np.float64)  # [bins, n]

        def evaluate(weights: np.ndarray) -> np.ndarray:
            gaps = np.abs((weights * (confidence - correct)) @ members.T)  # [R, bins]
            return gaps.sum(axis=1) / weights.sum(axis=1)

        return evaluate

    return WeightedMetric(name, prepare, higher_is_better=False)


def _negative_log_likelihood(name: str, found: _Probabilities) -> AdditiveMetric:
    def statistics(rows: Sequence[Row]) -> np.ndarray:
        chosen = [p[i] for p, i in zip(found(rows), _right(rows), strict=True)]
        return np.stack([-np.log(np.asarray(chosen) + _TINY), np.ones(len(rows))], axis=1)

    return AdditiveMetric(name, statistics, ratio, higher_is_better=False)


def _brier(name: str, found: _Probabilities) -> AdditiveMetric:
    """Half the sum over options of squared differences from the one-hot truth (Brier, 1950), averaged.

    For two options, it is the usual score of one of them.
    """

    def statistics(rows: Sequence[Row]) -> np.ndarray:
        pairs = zip(found(rows), _right(rows), strict=True)
        scores = [float(np.square(p - np.eye(len(p))[i]).sum()) / 2 for p, i in pairs]
        return np.stack([np.asarray(scores), np.ones(len(rows))], axis=1)

    return AdditiveMetric(name, statistics, ratio, higher_is_better=False)


def _area_under_risk_coverage() -> WeightedMetric:
    """Mean error rate of the most confident k rows, over all k (Geifman and El-Yaniv, 2017)."""

    def prepare(rows: Sequence[Row]) -> Resampled:
        confidence, correct = _confidence(rows, probabilities_of)
        order = np.argsort(-confidence, kind="stable")
        wrong = 1 - correct[order]

        def evaluate(weights: np.ndarray) -> np.ndarray:
            ordered = weights[:, order]
            covered = np.cumsum(ordered, axis=1)
            risk = np.cumsum(ordered * wrong, axis=1) / np.maximum(covered, _TINY)
            return (risk * ordered).sum(axis=1) / covered[:, -1]

        return evaluate

    return WeightedMetric("aurc", prepare, higher_is_better=False)


for _suffix, _found in (("", probabilities_of), ("_scaled", scaled_probabilities)):
    register(_ece(f"ece{_suffix}", _found))
    register(_negative_log_likelihood(f"nll{_suffix}", _found))
    register(_brier(f"brier{_suffix}", _found))
register(_area_under_risk_coverage())
