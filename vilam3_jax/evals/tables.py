"""Tables of results: the main table, with labels that no expert made, and a separate oracle table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from vilam3_jax.evals.estimates import Contrast, Estimate
from vilam3_jax.evals.statistics import ALL_TYPES, Difference, Summary

MAIN_TITLE = "Questions whose labels the experts did not make"
ORACLE_TITLE = "Oracle by construction: the expert returns the very map these questions are scored against"
ORACLE_NOTE = (
    "This table shows whether the model reads what its expert says, not whether the expert is right. "
    "Compare the falsified row: a model that reads its expert follows it into the wrong answer."
)
MAIN_NOTE = "Unparsed answers count as wrong. Intervals: 95 %, bootstrap over patients. Not for clinical use."
COLUMNS = ("question type", "label source", "arm", "accuracy", "95 % interval", "n", "patients", "unparsed")

_GROUPS = {"answerable": "answerable by an expert, not oracle"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells with a title above and notes below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """A Markdown section; `|` in cells is escaped."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        lines = [f"### {self.title}", "", line(self.columns), line("---" for _ in self.columns)]
        lines += [line(row) for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def to_text(self) -> str:
        """Columns padded with spaces, for a terminal."""
        grid = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        rule = tuple("-" * width for width in widths)
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (self.columns, rule, *self.rows)
        ]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join([self.title, "", *lines]) + "\n"


def interval_text(summary: Summary | Difference) -> str:
    """`0.61 to 0.88`, or why there is no interval, with the value of each volume."""
    if summary.interval is not None:
        low, high = summary.interval
        return f"{low:.2f} to {high:.2f}" + (f" ({summary.note})" if summary.note else "")
    values = ", ".join(f"{value:.2f}" for value in sorted(summary.per_cluster.values()))
    return f"{summary.note}: {values}"


def _row(one: Summary) -> tuple[str, ...]:
    return (
        *(one.question_type, one.label_source, one.arm, f"{one.accuracy:.3f}", interval_text(one)),
        *map(str, (one.n, one.clusters, one.unparsed)),
    )


def accuracy_tables(summaries: Sequence[Summary]) -> list[Table]:
    """All arms by question type: without oracle questions, and oracle questions only; none without rows."""
    arms = list(dict.fromkeys(one.arm for one in summaries))

    def key(one: Summary) -> tuple[Any, ...]:
        return one.question_type != ALL_TYPES, one.question_type, one.label_source, arms.index(one.arm)

    found = []
    for oracle, title, notes in (
        (False, MAIN_TITLE, (MAIN_NOTE,)),
        (True, ORACLE_TITLE, (ORACLE_NOTE, MAIN_NOTE)),
    ):
        rows = tuple(_row(one) for one in sorted(summaries, key=key) if one.oracle == oracle)
        found += [Table(title, COLUMNS, rows, notes)] if rows else []
    return found


def difference_table(differences: Sequence[tuple[str, Difference]]) -> Table:
    """Paired differences, each with the name of its group of questions."""
    rows = tuple(
        (
            *(_GROUPS.get(group, group), f"{d.first} - {d.second}", f"{d.difference:+.3f}", interval_text(d)),
            *map(str, (d.n, d.clusters, d.left_out)),
        )
        for group, d in differences
    )
    columns = ("questions", "arms", "difference", "95 % interval", "n", "patients", "left out")
    note = "Paired by question, bootstrap over patients; an interval that excludes 0 shows a difference."
    return Table("Differences in accuracy", columns, rows, (note,))


def estimate_table(estimates: Sequence[Estimate]) -> Table:
    """All metrics of the given arms and groups."""
    rows = tuple(
        (
            *(one.metric, one.group, one.arm, _number(one.value), _ends(one)),
            *map(str, (one.n, one.clusters, one.unparsed)),
        )
        for one in estimates
    )
    columns = ("metric", "questions", "arm", "value", "95 % interval", "n", "patients", "unparsed")
    return Table("Metrics of the protocol", columns, rows, (MAIN_NOTE,))


def contrast_table(contrasts: Sequence[Contrast]) -> Table:
    """Paired differences, with what they mean."""
    rows = tuple(
        (
            *(
                one.name,
                one.metric,
                f"{one.first} - {one.second}",
                _number(one.difference, sign="+"),
                _ends(one),
            ),
            "–" if one.p_value is None else f"{one.p_value:.4f}",
            *map(str, (one.n, one.clusters, one.left_out)),
        )
        for one in contrasts
    )
    columns = ("contrast", "metric", "arms", "difference", "95 % interval", "p", "n", "patients", "left out")
    note = (
        "Paired by question; interval: bootstrap over patients; p: randomisation over patients, two-sided, "
        "not corrected for the number of contrasts."
    )
    return Table("Contrasts of the protocol", columns, rows, (note,))


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def _ends(one: Estimate | Contrast) -> str:
    if one.interval is None:
        return one.note
    low, high = one.interval
    return f"{low:.3f} to {high:.3f}" + (f" ({one.note})" if one.note else "")
