"""What a quickstart run shows: one sentence, the arms behind it, and two dialogues."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vilam3_jax.report import formatting, runs

Entry = Mapping[str, Any]
Row = Mapping[str, Any]

_WITH, _WITHOUT, _FALSIFIED, _ = runs.ARMS


class Contrast(NamedTuple):
    """A question that the final model answered differently with its expert: `row` with, `before` without."""

    title: str
    row: Row
    before: Row


def sentence(document: Mapping[str, Any]) -> str:
    """Accuracy with and without experts on the questions that an expert can answer.

    Args:
      document: the summary of the run.

    Returns:
      Text; it says so if the interval of the difference includes 0 or is missing.
    """
    arms = {one["arm"]: one for one in document["answerable"]}
    found = _comparison(document, _WITH, _WITHOUT)
    if found is None:
        return "No question that an expert could answer was asked both with and without experts."
    shown = {name: formatting.percent(one["accuracy"]) for name, one in arms.items()}
    questions = f"{found['n']} held-out questions of {found['clusters']} patients that an expert can answer"
    difference = f"{formatting.points(found['difference'])} points"
    if not found["interval"]:
        text = f"Too few patients to tell whether experts help: on {questions}, "
    elif found["interval"][0] > 0:
        text = f"The model uses its experts: on {questions}, "
    elif found["interval"][1] < 0:
        text = f"In this run, experts make the answers worse: on {questions}, "
    else:
        text = f"This run does not show that experts help: on {questions}, "
    text += f"it is right on {shown[_WITH]} with experts and {shown[_WITHOUT]} without ({difference}"
    text += f", 95 % interval {formatting.points_interval(found['interval'])})" if found["interval"] else ")"
    if _FALSIFIED in shown:
        text += f"; with falsified expert results, on {shown[_FALSIFIED]}"
    return text + "."


def contrasts(arms: Sequence[runs.Arm]) -> list[Contrast]:
    """A dialogue in which the expert corrected the answer, and one in which it spoiled a right one.

    The second is one with a true result if there is any, else one with a falsified result.
    """
    rows = {arm.name: {row["item"]: row for row in arm.rows} for arm in arms}
    without = rows.get(_WITHOUT, {})

    def first(arm: str, fits: Callable[[Row, Row], bool]) -> tuple[Row, Row] | None:
        pairs = [
            (row, without[item])
            for item, row in rows.get(arm, {}).items()
            if item in without and row.get("trigger") and not row["oracle"] and fits(row, without[item])
        ]
        return min(pairs, key=lambda pair: hashlib.sha256(pair[0]["item"].encode()).digest(), default=None)

    def corrected(row: Row, before: Row) -> bool:
        return row["correct"] and not before["correct"]

    def spoiled(row: Row, before: Row) -> bool:
        return before["correct"] and not row["correct"]

    wanted = (
        ("The expert corrected the answer", (_WITH,), corrected),
        ("The expert should not have changed the answer", (_WITH, _FALSIFIED), spoiled),
    )
    found = []
    for title, names, fits in wanted:
        if pair := next((pair for name in names if (pair := first(name, fits))), None):
            found.append(Contrast(title, *pair))
    return found


def _comparison(document: Mapping[str, Any], first: str, second: str) -> Entry | None:
    wanted = ("answerable", first, second)
    found = (
        one
        for one in document.get("comparisons", ())
        if (one["group"], one["first"], one["second"]) == wanted
    )
    return next(found, None)
