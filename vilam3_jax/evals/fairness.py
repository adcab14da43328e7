"""`vilam3 evaluate fairness`: error rates by subgroup, and the gaps between them.

For questions that are answered by yes or no. The false negative rate is the share of present findings that
the model misses (*under-diagnosis*), the false positive rate that of absent findings that it reports. Groups
and intersections with few patients are not shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from vilam3_jax.errors import UserError
from vilam3_jax.evals import resampling
from vilam3_jax.evals.metrics.base import AdditiveMetric, Metric, Row, metric, ratio
from vilam3_jax.evals.tables import Table

MIN_PATIENTS = 20
_YES, _NO = "yes", "no"


def _rate(name: str, gold: str) -> AdditiveMetric:
    """Share of the answers to questions with this gold answer that are not right; unparsed ones are not."""

    def statistics(rows: Sequence[Row]) -> np.ndarray:
        return np.asarray([(float(r["gold"] == gold and not r["correct"]), r["gold"] == gold) for r in rows])

    return AdditiveMetric(name, statistics, ratio, higher_is_better=False)


FNR, FPR = _rate("fnr", _YES), _rate("fpr", _NO)


@dataclasses.dataclass(frozen=True)
class Gap:
    """A metric in one group minus that in all other patients.

    Attributes:
      metric: name of the metric.
      group: `key=value`, or several joined by ` & `.
      value, others: the metric in the group, and outside of it.
      gap: value minus others; None if one of them is undefined.
      interval: ends of its 95 % bootstrap interval over patients, or None.
      n, patients: questions and patients of the group.
    """

    metric: str
    group: str
    value: float | None
    others: float | None
    gap: float | None
    interval: list[float] | None
    n: int
    patients: int


def gaps(
    rows: Sequence[Row], keys: Sequence[str], *, min_patients: int = MIN_PATIENTS, seed: int = 0
) -> list[Gap]:
    """Gaps of all groups of `keys`, and of the intersections of two of them.

    A group with fewer than `min_patients` patients is left out, and so is one outside of which there are
    fewer. ECE and AUROC are added if rows have probabilities.

    Raises:
      UserError: no question for yes or no, or no group is large enough.
    """
    asked = [row for row in rows if row["gold"] in (_YES, _NO)]
    if not asked:
        raise UserError("fairness: no question is answered by yes or no; evaluate findings")
    chosen: list[Metric] = [FNR, FPR]
    if all("probabilities" in row for row in asked):
        chosen += [metric("auroc"), metric("ece")]
    names = [(key,) for key in keys] + list(itertools.combinations(keys, 2))
    members: dict[str, list[bool]] = {}
    for combined in names:
        values = [tuple((row.get("groups") or {}).get(key) for key in combined) for row in asked]
        for value in sorted({one for one in values if None not in one}):
            label = " & ".join(f"{key}={part}" for key, part in zip(combined, value, strict=True))
            members[label] = [one == value for one in values]
    found = []
    for label, inside in members.items():
        own = [row for row, belongs in zip(asked, inside, strict=True) if belongs]
        others = [row for row, belongs in zip(asked, inside, strict=True) if not belongs]
        patients = len({row["cluster"] for row in own})
        if min(patients, len({row["cluster"] for row in others})) >= min_patients:
            found += [_gap(one, label, own, others, patients, seed) for one in chosen]
    if not found:
        raise UserError(
            f"fairness: no group of {', '.join(keys)} has {min_patients} patients in and outside of it"
        )
    return found


def _gap(one: Metric, label: str, own: Sequence[Row], others: Sequence[Row], patients: int, seed: int) -> Gap:
    names = np.unique([str(row["cluster"]) for row in (*own, *others)])
    places = {name: place for place, name in enumerate(names)}

    def evaluated(rows: Sequence[Row]) -> resampling.Resampled:
        clusters = np.asarray([places[str(row["cluster"])] for row in rows])
        evaluate, known = one.resampled(rows, clusters), int(clusters.max()) + 1
        return lambda draws: evaluate(draws[:, :known])

    # Patients are drawn once for both sides, as a patient may have images in both.
    evaluate_own, evaluate_others = evaluated(own), evaluated(others)

    def difference(draws: np.ndarray) -> np.ndarray:
        return evaluate_own(draws) - evaluate_others(draws)

    once = np.ones((1, len(names)))
    value, other = float(evaluate_own(once)[0]), float(evaluate_others(once)[0])
    defined = math.isfinite(value - other)
    interval = resampling.percentile_interval(difference, len(names), seed=seed) if defined else None
    return Gap(
        metric=one.name,
        group=label,
        value=value if math.isfinite(value) else None,
        others=other if math.isfinite(other) else None,
        gap=value - other if defined else None,
        interval=list(interval) if interval else None,
        n=len(own),
        patients=patients,
    )


def gap_table(found: Sequence[Gap]) -> Table:
    """One row per group and metric."""

    def number(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}.3f}"

    rows = tuple(
        (
            *(one.group, one.metric, number(one.value), number(one.others), number(one.gap, "+")),
            "–" if one.interval is None else f"{one.interval[0]:+.3f} to {one.interval[1]:+.3f}",
            *(str(one.n), str(one.patients)),
        )
        for one in found
    )
    columns = ("group", "metric", "in the group", "outside", "gap", "95 % interval", "n", "patients")
    note = (
        f"{len(found)} comparisons, not corrected for their number: about one in twenty intervals misses 0 "
        "by chance. fnr: present findings that were missed; fpr: absent findings that were reported. "
        "Not for clinical use."
    )
    return Table("Subgroups", columns, rows, (note,))


def parser() -> argparse.ArgumentParser:
    """Of `vilam3 evaluate fairness`."""
    made = argparse.ArgumentParser(
        prog="vilam3 evaluate fairness", description="Error rates by subgroup, with intervals of the gaps."
    )
    made.add_argument("result", help="folder written by `vilam3 evaluate --out`, of yes-no questions")
    made.add_argument("--by", default="sex,age_band", help="keys of the records (default: sex,age_band)")
    made.add_argument("--min_patients", type=int, default=MIN_PATIENTS, help="of a group that is shown")
    made.add_argument("--out", help="also write the table: FILE.html, FILE.md or FILE.json")
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return made
