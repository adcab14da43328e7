"""Accuracies with intervals that respect the clusters: questions about one patient are not independent.

A *row* is one answered question, as written by `vilam3_jax.evals.conditions`. This module reads its keys
`item`, `cluster`, `correct`, `unparsed`, `arm`, `question_type`, `label_source` and `oracle`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]

MIN_CLUSTERS = 10
TOO_FEW = "too few volumes for an interval"
ALL_ALIKE = "every volume scores alike; resampling them cannot show the spread"
ALL_TYPES = "all"


@dataclasses.dataclass(frozen=True)
class Summary:
    """Accuracy of one arm on one group of questions.

    Attributes:
      arm: which run answered.
      question_type: the type, or `all`.
      label_source: whose word the right answers are, or `all`.
      oracle: the expert that these questions call returns the very labels they are scored against.
      n: questions.
      clusters: patients or volumes behind them.
      accuracy: share of right answers; unparsed answers count as wrong.
      unparsed: answers in which the protocol's parser found nothing.
      interval: 95 % bootstrap interval over clusters, or None below `MIN_CLUSTERS` clusters.
      per_cluster: cluster -> accuracy, where there is no interval.
      note: what a reader must know of the interval, or the empty string.
    """

    arm: str
    question_type: str
    label_source: str
    oracle: bool
    n: int
    clusters: int
    accuracy: float
    unparsed: int
    interval: tuple[float, float] | None
    per_cluster: dict[str, float]
    note: str

    def to_json(self) -> dict[str, Any]:
        """The record of `summary.json`, with plain lists and floats."""
        record = dataclasses.asdict(self)
        record["interval"] = None if self.interval is None else list(self.interval)
        return record


@dataclasses.dataclass(frozen=True)
class Difference:
    """Accuracy of one arm minus another's on the questions that both answered.

    Attributes:
      first: arm whose accuracy is counted positive.
      second: arm that is subtracted.
      n: questions that both answered.
      clusters: patients or volumes behind them.
      difference: accuracy(first) - accuracy(second) on these questions.
      interval: 95 % paired bootstrap interval over clusters, or None below `MIN_CLUSTERS` clusters.
      per_cluster: cluster -> difference, where there is no interval.
      left_out: questions that only one of the two answered.
      note: what a reader must know of the interval, or the empty string.
    """

    first: str
    second: str
    n: int
    clusters: int
    difference: float
    interval: tuple[float, float] | None
    per_cluster: dict[str, float]
    left_out: int
    note: str

    def to_json(self) -> dict[str, Any]:
        """A JSON record with plain lists and floats."""
        record = dataclasses.asdict(self)
        record["interval"] = None if self.interval is None else list(self.interval)
        return record


def cluster_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[str] | np.ndarray,
    *,
    repetitions: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, resampling whole clusters with replacement.

    One repetition draws as many clusters as there are and takes the mean over all their values, so that
    large clusters weigh more, as they do in the mean itself (Davison and Hinkley, 1997, section 3.8).

    Args:
      values: [n] one number per question.
      clusters: [n] its patient or volume.
      repetitions: bootstrap repetitions.
      confidence: probability mass between the two ends.
      seed: of the resampling; the same input and seed give the same interval.

    Raises:
      ValueError: no values, or lengths that differ.
    """
    values = np.asarray(values, np.float64)
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values for {len(clusters)} clusters; at least one of each is needed")
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(inverse, weights=values, minlength=len(names))  # [C]
    sizes = np.bincount(inverse, minlength=len(names)).astype(np.float64)  # [C]
    rng = np.random.default_rng(seed)
    # How often each cluster is drawn: [repetitions, C].
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=repetitions)
    means = (draws @ sums) / (draws @ sizes)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _interval_or_values(
    values: np.ndarray, clusters: list[str], seed: int
) -> tuple[tuple[float, float] | None, dict[str, float], str]:
    """Interval, per-cluster means and note of one group of questions."""
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    means = np.bincount(inverse, weights=values) / np.bincount(inverse)
    if len(names) < MIN_CLUSTERS:
        return None, {str(n): float(m) for n, m in zip(names, means, strict=True)}, TOO_FEW
    interval = cluster_interval(values, clusters, seed=seed)
    return interval, {}, ALL_ALIKE if np.ptp(means) == 0 else ""


def summarise_group(
    rows: Sequence[Row], *, arm: str, question_type: str, label_source: str, oracle: bool, seed: int = 0
) -> Summary:
    """Summary of `rows` taken as one group.

    Args:
      rows: at least one answered question.
      arm: name to put on the summary.
      question_type: name to put on the summary.
      label_source: name to put on the summary.
      oracle: flag to put on the summary.
      seed: of the bootstrap.

    Raises:
      ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"no rows for arm {arm!r}, question type {question_type!r}")
    correct = np.asarray([float(row["correct"]) for row in rows])
    clusters = [str(row["cluster"]) for row in rows]
    interval, per_cluster, note = _interval_or_values(correct, clusters, seed)
    return Summary(
        arm=arm,
        question_type=question_type,
        label_source=label_source,
        oracle=oracle,
        n=len(rows),
        clusters=len(set(clusters)),
        accuracy=float(correct.mean()),
        unparsed=sum(bool(row["unparsed"]) for row in rows),
        interval=interval,
        per_cluster=per_cluster,
        note=note,
    )


def summarise(rows: Iterable[Row], *, seed: int = 0) -> list[Summary]:
    """Groups by (arm, oracle, question type, label source), and adds `all` per (arm, oracle).

    Oracle questions never enter the `all` of the others, nor the others theirs.

    Returns:
      Summaries in the order: arm as first seen, not oracle before oracle, `all`, then by type and source.
    """
    groups: dict[tuple[str, bool, str, str], list[Row]] = {}
    arms: dict[str, int] = {}
    for row in rows:
        arm, oracle = str(row["arm"]), bool(row["oracle"])
        arms.setdefault(arm, len(arms))
        own = (arm, oracle, str(row["question_type"]), str(row["label_source"]))
        for key in (own, (arm, oracle, ALL_TYPES, ALL_TYPES)):
            groups.setdefault(key, []).append(row)

    def order(key: tuple[str, bool, str, str]) -> tuple[Any, ...]:
        arm, oracle, question_type, source = key
        return arms[arm], oracle, question_type != ALL_TYPES, question_type, source

    return [
        summarise_group(
            groups[key], arm=key[0], oracle=key[1], question_type=key[2], label_source=key[3], seed=seed
        )
        for key in sorted(groups, key=order)
    ]


def paired_difference(first: Sequence[Row], second: Sequence[Row], *, seed: int = 0) -> Difference:
    """Difference in accuracy of two arms on the questions that both answered.

    Args:
      first: rows of one arm; `item` is unique among them.
      second: rows of the other arm.
      seed: of the bootstrap.

    Raises:
      ValueError: no question in common, or an item twice in one arm.
    """
    by_item: list[dict[str, Row]] = []
    for rows in (first, second):
        index = {str(row["item"]): row for row in rows}
        if len(index) != len(rows):
            raise ValueError("an item stands twice in one arm")
        by_item.append(index)
    common = [item for item in by_item[0] if item in by_item[1]]
    if not common:
        raise ValueError("the two arms have no question in common")
    delta = np.asarray([float(by_item[0][i]["correct"]) - float(by_item[1][i]["correct"]) for i in common])
    clusters = [str(by_item[0][i]["cluster"]) for i in common]
    interval, per_cluster, note = _interval_or_values(delta, clusters, seed)
    return Difference(
        first=str(first[0]["arm"]),
        second=str(second[0]["arm"]),
        n=len(common),
        clusters=len(set(clusters)),
        difference=float(delta.mean()),
        interval=interval,
        per_cluster=per_cluster,
        left_out=len(first) + len(second) - 2 * len(common),
        note=note,
    )
