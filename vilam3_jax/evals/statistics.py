"""Accuracies with cluster bootstrap intervals, as questions about one patient are not independent.

A *row* is one answered question of `vilam3_jax.evals.conditions`. This module reads its keys `item`,
`cluster`, `correct`, `unparsed`, `arm`, `question_type`, `label_source` and `oracle`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vilam3_jax.evals import resampling
from vilam3_jax.evals.estimates import MIN_CLUSTERS, TOO_FEW

Row = dict[str, Any]

ALL_ALIKE = "every volume scores alike; resampling them cannot show the spread"
ALL_TYPES = "all"


@dataclasses.dataclass(frozen=True)
class Summary:
    """Accuracy of one arm on one group of questions.

    Attributes:
      arm: name of the arm.
      question_type, label_source: as in the rows, or `all`.
      oracle: whether the expert returns the labels that its answers are scored against.
      n, clusters: numbers of questions, and of patients or volumes.
      accuracy: share of right answers; unparsed answers count as wrong.
      unparsed: answers that the protocol's parser could not read.
      interval: ends of the 95 % bootstrap interval over clusters, or None below `MIN_CLUSTERS` clusters.
      per_cluster: cluster -> accuracy, if there is no interval.
      note: a remark on the interval, or the empty string.
    """

    arm: str
    question_type: str
    label_source: str
    oracle: bool
    n: int
    clusters: int
    accuracy: float
    unparsed: int
    interval: list[float] | None
    per_cluster: dict[str, float]
    note: str


@dataclasses.dataclass(frozen=True)
class Difference:
    """Accuracy of one arm minus another's on the questions that both answered.

    Attributes:
      first, second: names of the arms.
      n, clusters: numbers of questions that both answered, and of patients or volumes.
      difference: accuracy(first) - accuracy(second) on these questions.
      interval: ends of the 95 % paired bootstrap interval over clusters, or None below `MIN_CLUSTERS`.
      per_cluster: cluster -> difference, if there is no interval.
      left_out: questions that only one of the two answered.
      note: a remark on the interval, or the empty string.
    """

    first: str
    second: str
    n: int
    clusters: int
    difference: float
    interval: list[float] | None
    per_cluster: dict[str, float]
    left_out: int
    note: str


def cluster_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[str] | np.ndarray,
    *,
    repetitions: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, resampling whole clusters with replacement.

    A repetition draws as many clusters as there are and takes the mean over all their values, so large
    clusters weigh more, as in the mean itself (Davison and Hinkley, 1997, section 3.8).

    Args:
      values: [n], one number per question.
      clusters: [n], the patient or volume of each.
      repetitions: number of bootstrap samples, see `resampling.counts`.
      confidence: probability mass of the interval.
      seed: seed of the resampling.

    Raises:
      ValueError: no values, or different lengths.
    """
    values = np.asarray(values, np.float64)
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values for {len(clusters)} clusters; at least one of each is needed")
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(inverse, weights=values, minlength=len(names))  # [C]
    sizes = np.bincount(inverse, minlength=len(names)).astype(np.float64)  # [C]
    found = resampling.percentile_interval(
        lambda draws: (draws @ sums) / (draws @ sizes),
        len(names),
        repetitions=repetitions,
        confidence=confidence,
        seed=seed,
    )
    assert found is not None  # a mean is always defined
    return found


def _spread(values: np.ndarray, clusters: list[str], seed: int) -> dict[str, Any]:
    """The fields `n`, `clusters`, `interval`, `per_cluster` and `note` of one group of questions."""
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    means = np.bincount(inverse, weights=values) / np.bincount(inverse)
    found = {"n": len(values), "clusters": len(names), "interval": None, "per_cluster": {}}
    if len(names) < MIN_CLUSTERS:
        found["per_cluster"] = {str(n): float(m) for n, m in zip(names, means, strict=True)}
        return {**found, "note": TOO_FEW}
    found["interval"] = list(cluster_interval(values, clusters, seed=seed))
    return {**found, "note": ALL_ALIKE if np.ptp(means) == 0 else ""}


def summarise_group(
    rows: Sequence[Row], *, arm: str, question_type: str, label_source: str, oracle: bool, seed: int = 0
) -> Summary:
    """Summary of `rows` as one group, labelled with the other arguments; `seed` is of the bootstrap.

    Raises:
      ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"no rows for arm {arm!r}, question type {question_type!r}")
    correct = np.asarray([float(row["correct"]) for row in rows])
    clusters = [str(row["cluster"]) for row in rows]
    return Summary(
        arm=arm,
        question_type=question_type,
        label_source=label_source,
        oracle=oracle,
        accuracy=float(correct.mean()),
        unparsed=sum(bool(row["unparsed"]) for row in rows),
        **_spread(correct, clusters, seed),
    )


def summarise(rows: Iterable[Row], *, seed: int = 0) -> list[Summary]:
    """Groups by (arm, oracle, question type, label source), and adds `all` per (arm, oracle).

    Oracle questions and others have separate `all` groups.

    Returns:
      Summaries ordered by arm as first seen, not oracle before oracle, `all` first, then type and source.
    """
    groups: dict[tuple[str, bool, str, str], list[Row]] = {}
    arms: dict[str, int] = {}
    for row in rows:
        arm, oracle = str(row["arm"]), bool(row["oracle"])
        arms.setdefault(arm, len(arms))
        own = (arm, oracle, str(row["question_type"]), str(row["label_source"]))
        for key in (own, (arm, oracle, ALL_TYPES, ALL_TYPES)):
            groups.setdefault(key, []).append(row)

    def order(group: tuple[tuple[str, bool, str, str], list[Row]]) -> tuple[Any, ...]:
        arm, oracle, kind, source = group[0]
        return arms[arm], oracle, kind != ALL_TYPES, kind, source

    return [
        summarise_group(own, arm=arm, oracle=oracle, question_type=kind, label_source=source, seed=seed)
        for (arm, oracle, kind, source), own in sorted(groups.items(), key=order)
    ]


def paired_difference(first: Sequence[Row], second: Sequence[Row], *, seed: int = 0) -> Difference:
    """Difference in accuracy of two arms on the questions that both answered.

    Raises:
      ValueError: no question in common, or an item twice in one arm.
    """
    left, right = ({str(row["item"]): row for row in rows} for rows in (first, second))
    if len(left) != len(first) or len(right) != len(second):
        raise ValueError("an item is twice in one arm")
    common = [item for item in left if item in right]
    if not common:
        raise ValueError("the two arms have no question in common")
    delta = np.asarray([float(left[i]["correct"]) - float(right[i]["correct"]) for i in common])
    return Difference(
        first=str(first[0]["arm"]),
        second=str(second[0]["arm"]),
        difference=float(delta.mean()),
        left_out=len(first) + len(second) - 2 * len(common),
        **_spread(delta, [str(left[i]["cluster"]) for i in common], seed),
    )


def paired_differences(
    pairs: Sequence[tuple[Sequence[Row], Sequence[Row]]], *, seed: int = 0
) -> list[tuple[str, Difference]]:
    """(group, difference) of each pair of arms, in every group in which they have questions in common.

    Groups: `main`, no oracle questions; `answerable`, those of them that an expert could answer; `oracle`.
    """
    groups = {
        "main": lambda row: not row["oracle"],
        "answerable": lambda row: not row["oracle"] and row.get("expert"),
        "oracle": lambda row: row["oracle"],
    }
    found = []
    for group, belongs in groups.items():
        for pair in pairs:
            first, second = ([row for row in rows if belongs(row)] for rows in pair)
            if {row["item"] for row in first} & {row["item"] for row in second}:
                found.append((group, paired_difference(first, second, seed=seed)))
    return found
