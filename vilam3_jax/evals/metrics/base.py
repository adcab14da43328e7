"""What a metric is: a number for a set of answered questions that can be resampled by patient.

A bootstrap evaluates a metric thousands of times. Most metrics are functions of sums over questions
(accuracy, F1, mean absolute error, corpus BLEU), so they are evaluated from one sum per patient; the others
(AUROC, calibration) from one weight per question.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vilam3_jax.errors import UserError
from vilam3_jax.evals import metrics

Row = Mapping[str, Any]  # a line of `rows.jsonl`
Resampled = Callable[[np.ndarray], np.ndarray]

_MAX_WEIGHTS = 1 << 24  # of one block of resamples: 128 MB


class Metric(Protocol):
    """A metric of answered questions."""

    @property
    def name(self) -> str:
        """Unique name, as written in results."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is a better one."""
        ...

    def resampled(self, rows: Sequence[Row], clusters: np.ndarray) -> Resampled:
        """The metric as a function of how often each cluster is drawn.

        Args:
          rows: [n] answered questions.
          clusters: int [n], the cluster of each, from 0.

        Returns:
          (float64 [R, C], counts of each cluster in R resamples) ↦ float64 [R], NaN where undefined.
        """
        ...


@dataclasses.dataclass(frozen=True)
class AdditiveMetric:
    """A function of sums over questions.

    Attributes:
      name: unique name.
      statistics: [n] rows ↦ float64 [n, k], what is summed.
      value: float64 [..., k] sums ↦ float64 [...], NaN where undefined.
      higher_is_better: whether a larger value is a better one.
    """

    name: str
    statistics: Callable[[Sequence[Row]], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool = True

    def resampled(self, rows: Sequence[Row], clusters: np.ndarray) -> Resampled:
        """See `Metric`."""
        per_row = np.asarray(self.statistics(rows), np.float64)
        sums = np.zeros((int(clusters.max()) + 1, per_row.shape[1]))
        np.add.at(sums, clusters, per_row)

        def evaluate(draws: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(self.value(draws @ sums), np.float64)

        return evaluate


@dataclasses.dataclass(frozen=True)
class WeightedMetric:
    """A function of one weight per question.

    Attributes:
      name: unique name.
      prepare: [n] rows ↦ a function (float64 [R, n] weights ↦ float64 [R], NaN where undefined).
      higher_is_better: whether a larger value is a better one.
    """

    name: str
    prepare: Callable[[Sequence[Row]], Resampled]
    higher_is_better: bool = True

    def resampled(self, rows: Sequence[Row], clusters: np.ndarray) -> Resampled:
        """See `Metric`."""
        of_weights = self.prepare(rows)
        block = max(1, _MAX_WEIGHTS // max(1, len(rows)))

        def evaluate(draws: np.ndarray) -> np.ndarray:
            blocks = (draws[start : start + block] for start in range(0, len(draws), block))
            return np.concatenate([of_weights(own[:, clusters].astype(np.float64)) for own in blocks])

        return evaluate


def mean_of(name: str, key: str, *, higher_is_better: bool = True) -> AdditiveMetric:
    """The mean of a number that every row has."""

    def statistics(rows: Sequence[Row]) -> np.ndarray:
        values = np.asarray([float(row[key]) for row in rows])
        return np.stack([values, np.ones(len(rows))], axis=1)

    return AdditiveMetric(name, statistics, ratio, higher_is_better)


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum over second: float64 [..., 2] ↦ [...]."""
    return sums[..., 0] / sums[..., 1]


ACCURACY = mean_of("accuracy", "correct")

_registry: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Adds a metric.

    Raises:
      UserError: another metric has the name.
    """
    if _registry.setdefault(metric.name, metric) is not metric:
        raise UserError(f"metric {metric.name!r} exists already; choose another name")
    return metric


def metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
      UserError: there is none; lists those there are.
    """
    for module in metrics.MODULES:
        importlib.import_module(f"{metrics.__name__}.{module}")
    if name not in _registry:
        raise UserError(f"metric {name!r}: not known; choose one of {', '.join(sorted(_registry))}")
    return _registry[name]


register(ACCURACY)
