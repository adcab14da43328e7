"""Estimates of any metric with intervals over patients, and paired differences between arms."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vilam3_jax.evals import resampling
from vilam3_jax.evals.metrics.base import Metric, Resampled, Row

MIN_CLUSTERS = 10
ALL = "all"
TOO_FEW = "too few patients for an interval"
ALL_ALIKE = "every patient scores alike; resampling them cannot show the spread"
UNDEFINED = "undefined on these questions"
OFTEN_UNDEFINED = "undefined in most resamples"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One metric of one arm on one group of questions.

    Attributes:
      metric: name of the metric.
      arm: name of the arm.
      group: `all`, or `key=value` of the rows.
      value: the metric; None if it is undefined.
      interval: ends of the 95 % bootstrap interval over clusters, or None.
      n, clusters: numbers of questions, and of patients or volumes.
      unparsed: answers that the protocol's parser could not read.
      note: why there is no interval, or a remark on it.
    """

    metric: str
    arm: str
    group: str
    value: float | None
    interval: list[float] | None
    n: int
    clusters: int
    unparsed: int
    note: str


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A metric of one arm minus that of another, on the questions that both answered.

    Attributes:
      name: what the difference means, such as 'gain from experts'.
      metric: name of the metric.
      first, second: names of the arms.
      group: as in `Estimate`.
      difference: first minus second; None if it is undefined.
      interval: ends of the 95 % paired bootstrap interval over clusters, or None.
      p_value: of the paired randomisation test, or None.
      n, clusters: numbers of questions that both answered, and of patients or volumes.
      left_out: questions that only one of the two answered.
      note: why there is no interval, or a remark on it.
    """

    name: str
    metric: str
    first: str
    second: str
    group: str
    difference: float | None
    interval: list[float] | None
    p_value: float | None
    n: int
    clusters: int
    left_out: int
    note: str


def estimate(metric: Metric, rows: Sequence[Row], *, arm: str, group: str = ALL, seed: int = 0) -> Estimate:
    """The metric of rows, which must not be empty."""
    inverse, clusters = _clusters(rows)
    evaluate = metric.resampled(rows, inverse)
    value = float(evaluate(np.ones((1, clusters)))[0])
    interval, note = _interval(evaluate, value, clusters, seed)
    unparsed = sum(bool(row["unparsed"]) for row in rows)
    defined = value if math.isfinite(value) else None
    return Estimate(metric.name, arm, group, defined, interval, len(rows), clusters, unparsed, note)


def contrast(
    metric: Metric,
    first: Sequence[Row],
    second: Sequence[Row],
    *,
    name: str,
    arms: tuple[str, str],
    group: str = ALL,
    seed: int = 0,
) -> Contrast | None:
    """The difference of two arms on the questions that both answered; None if there are none.

    Raises:
      ValueError: an item twice in one arm.
    """
    left, right = ({str(row["item"]): row for row in rows} for rows in (first, second))
    if len(left) != len(first) or len(right) != len(second):
        raise ValueError("an item is twice in one arm")
    common = [item for item in left if item in right]
    if not common:
        return None
    pairs = [left[item] for item in common], [right[item] for item in common]
    inverse, clusters = _clusters(pairs[0])
    evaluate_first, evaluate_second = (metric.resampled(rows, inverse) for rows in pairs)

    def difference(draws: np.ndarray) -> np.ndarray:
        return evaluate_first(draws) - evaluate_second(draws)

    value = float(difference(np.ones((1, clusters)))[0])
    interval, note = _interval(difference, value, clusters, seed)
    both = metric.resampled([*pairs[0], *pairs[1]], np.concatenate([inverse, inverse + clusters]))
    p_value = (
        resampling.randomisation_p_value(both, clusters, seed=seed) if clusters >= MIN_CLUSTERS else None
    )
    defined = value if math.isfinite(value) else None
    left_out = len(first) + len(second) - 2 * len(common)
    return Contrast(
        *(name, metric.name, *arms, group, defined, interval, p_value, len(common), clusters, left_out, note)
    )


def _clusters(rows: Sequence[Row]) -> tuple[np.ndarray, int]:
    if not rows:
        raise ValueError("no rows")
    names, inverse = np.unique([str(row["cluster"]) for row in rows], return_inverse=True)
    return inverse, len(names)


def _interval(evaluate: Resampled, value: float, clusters: int, seed: int) -> tuple[list[float] | None, str]:
    if not math.isfinite(value):
        return None, UNDEFINED
    if clusters < MIN_CLUSTERS:
        return None, TOO_FEW
    found = resampling.percentile_interval(evaluate, clusters, seed=seed)
    if found is None:
        return None, OFTEN_UNDEFINED
    return list(found), ALL_ALIKE if found[0] == found[1] else ""


@dataclasses.dataclass(frozen=True)
class MeanOverGroups:
    """The unweighted mean of a metric over the values of a key, such as question types.

    A group that is absent from a resample, or in which the metric is undefined, is left out of that mean.
    """

    base: Metric
    key: str

    @property
    def name(self) -> str:
        """`<metric>, mean over <key>`."""
        return f"{self.base.name}, mean over {self.key}"

    @property
    def higher_is_better(self) -> bool:
        """As of the metric."""
        return self.base.higher_is_better

    def resampled(self, rows: Sequence[Row], clusters: np.ndarray) -> Resampled:
        """See `Metric`."""
        groups: dict[str, list[int]] = {}
        for position, row in enumerate(rows):
            groups.setdefault(str(row[self.key]), []).append(position)
        total = int(clusters.max()) + 1
        parts: list[tuple[np.ndarray, Resampled]] = []
        for positions in groups.values():
            names, inverse = np.unique(clusters[positions], return_inverse=True)
            parts.append((names, self.base.resampled([rows[i] for i in positions], inverse)))

        def evaluate(draws: np.ndarray) -> np.ndarray:
            assert draws.shape[1] == total
            values = np.stack([of_group(draws[:, names]) for names, of_group in parts])  # [groups, R]
            defined = np.isfinite(values)
            with np.errstate(invalid="ignore"):
                return np.where(defined, values, 0).sum(axis=0) / defined.sum(axis=0)

        return evaluate


@functools.cache
def aggregated(metric: Metric, aggregation: str) -> Metric:
    """The metric under an aggregation of `Protocol`.

    Raises:
      ValueError: unknown aggregation.
    """
    if aggregation == "pooled":
        return metric
    if aggregation == "mean_of_types":
        return MeanOverGroups(metric, "question_type")
    raise ValueError(f"aggregation {aggregation!r}: must be pooled or mean_of_types")


def group_rows(rows: Sequence[Row], key: str) -> Mapping[str, list[Row]]:
    """Rows by `key=value`; `key` is one of a row or of its `groups`. Rows without it are left out."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        value: Any = row.get(key, (row.get("groups") or {}).get(key))
        if value is not None:
            found.setdefault(f"{key}={value}", []).append(row)
    return dict(sorted(found.items()))
