"""Metrics of classes: rows with `gold`, `parsed` (None if unparsed), and for ranks `probabilities`.

The *positive* class is `yes`. An answer that could not be parsed is of no class: it is a missed positive, or
a negative that was not recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vilam3_jax.evals.metrics.base import Resampled, Row, WeightedMetric, register

POSITIVE = "yes"


def _balanced_accuracy() -> WeightedMetric:
    """Mean of the recall over the classes that occur among the gold answers."""

    def prepare(rows: Sequence[Row]) -> Resampled:
        classes, inverse = np.unique([str(row["gold"]) for row in rows], return_inverse=True)
        members = (inverse == np.arange(len(classes))[:, None]).astype(np.float64)  # [classes, n]
        correct = np.asarray([float(row["correct"]) for row in rows])

        def evaluate(weights: np.ndarray) -> np.ndarray:
            total = weights @ members.T  # [R, classes]
            hits = (weights * correct) @ members.T
            drawn = total > 0
            return (hits / np.where(drawn, total, 1)).sum(axis=1) / drawn.sum(axis=1)

        return evaluate

    return WeightedMetric("balanced_accuracy", prepare)


def _ranked(name: str, of_groups: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> WeightedMetric:
    """A metric of ranks.

    Args:
      name: of the metric.
      of_groups: (float64 [R, G] weight of the positives, of the negatives) ↦ float64 [R]; groups of equal
        probability, the least probable first.
    """

    def prepare(rows: Sequence[Row]) -> Resampled:
        scores = np.asarray([float(row["probabilities"][POSITIVE]) for row in rows])
        positive = np.asarray([row["gold"] == POSITIVE for row in rows], np.float64)
        order = np.argsort(scores, kind="stable")
        starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))

        def evaluate(weights: np.ndarray) -> np.ndarray:
            ordered = weights[:, order]
            positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
            negatives = np.add.reduceat(ordered * (1 - positive[order]), starts, axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                return of_groups(positives, negatives)

        return evaluate

    return WeightedMetric(name, prepare)


def _auroc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Share of (positive, negative) pairs in the right order, ties as one half (Hanley and McNeil, 1982)."""
    below = np.cumsum(negatives, axis=1) - negatives / 2
    return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Precision at each threshold, weighted by the increase in recall; no interpolation."""
    found = np.cumsum(positives[:, ::-1], axis=1)
    shown = found + np.cumsum(negatives[:, ::-1], axis=1)
    precision = np.where(shown > 0, found / np.maximum(shown, 1e-300), 0)
    return (positives[:, ::-1] * precision).sum(axis=1) / positives.sum(axis=1)


register(_balanced_accuracy())
register(_ranked("auroc", _auroc))
register(_ranked("average_precision", _average_precision))
