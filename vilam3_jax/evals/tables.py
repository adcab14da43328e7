"""Tables of results: the main table, with labels that no expert made, and a separate oracle table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from vilam3_jax.evals.statistics import ALL_TYPES, Difference, Summary

MAIN_TITLE = "Questions whose labels the experts did not make"
ORACLE_TITLE = "Oracle by construction: the expert returns the very map these questions are scored against"
ORACLE_NOTE = (
    "This table shows whether the model reads what its expert says, not whether the expert is right. "
    "Compare the falsified row: a model that reads its expert follows it into the wrong answer."
)
MAIN_NOTE = (
    "Unparsed answers count as wrong. Intervals: 95 %, bootstrap over patients. "
    "The experts are stand-ins of public-package quality. Not for clinical use."
)
COLUMNS = ("question type", "label source", "arm", "accuracy", "95 % interval", "n", "volumes", "unparsed")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells with a title above and notes below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields; JSON writes tuples as lists."""
        return dataclasses.asdict(self)

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


def _table(title: str, summaries: Sequence[Summary], notes: tuple[str, ...]) -> Table:
    order = {arm: position for position, arm in enumerate(dict.fromkeys(s.arm for s in summaries))}

    def key(one: Summary) -> tuple[Any, ...]:
        return one.question_type != ALL_TYPES, one.question_type, one.label_source, order[one.arm]

    return Table(title, COLUMNS, tuple(map(_row, sorted(summaries, key=key))), notes)


def main_table(summaries: Sequence[Summary]) -> Table:
    """All arms by question type, without oracle questions."""
    return _table(MAIN_TITLE, [s for s in summaries if not s.oracle], (MAIN_NOTE,))


def oracle_table(summaries: Sequence[Summary]) -> Table:
    """All arms by question type, oracle questions only."""
    return _table(ORACLE_TITLE, [s for s in summaries if s.oracle], (ORACLE_NOTE, MAIN_NOTE))


def difference_table(differences: Sequence[tuple[str, Difference]]) -> Table:
    """Paired differences, each with the name of its group of questions."""
    rows = tuple(
        (
            *(group, f"{d.first} - {d.second}", f"{d.difference:+.3f}", interval_text(d)),
            *map(str, (d.n, d.clusters, d.left_out)),
        )
        for group, d in differences
    )
    columns = ("questions", "arms", "difference", "95 % interval", "n", "volumes", "left out")
    note = "Paired by question, bootstrap over patients; an interval that excludes 0 shows a difference."
    return Table("Differences in accuracy", columns, rows, (note,))
