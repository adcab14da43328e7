"""What a run did, in memory that does not grow with it."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import shutil
import tempfile
from typing import IO

from etils import epath

from vilam3_experts.engine.work import Outcome
from vilam3_jax.runtime import paths

MAX_LISTED = 1000
MAX_REASONS = 200
_NAMES_OF_REASON = 3
_OTHER = "other reasons, see the list"


@dataclasses.dataclass
class Reason:
    """Why some inputs have no answer.

    Attributes:
      status: `failed`, `unreadable` or `unavailable`.
      text: of the first of them.
      count: how many.
      names: of the first few.
    """

    status: str
    text: str
    count: int = 0
    names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Summary:
    """What a run did.

    Attributes:
      counts: `annotated`, `skipped` (already stored), `failed` (stored with their reason), `unreadable`
        (nothing to store: the input has no content key), `unavailable` (could not be read now), `planned`
        (would be run), each with its number.
      problems: input name, and why it failed or could not be read; the first `MAX_LISTED`.
      notes: input name, and what its reader assumed, repaired or skipped; the first `MAX_LISTED`.
      planned: names of the first inputs that would be run.
      noted: number of inputs with notes.
      reasons: why inputs have no answer, those that differ only in names and numbers together.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    planned: list[str] = dataclasses.field(default_factory=list)
    noted: int = 0
    reasons: dict[tuple[str, str], Reason] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """One line for people."""
        names = ["annotated", "skipped", "failed", "unreadable"]
        names += [name for name in ("unavailable", "planned") if self.counts[name]]
        return ", ".join(f"{self.counts[n]} {n}" for n in names)

    def add(self, outcome: Outcome) -> None:
        """Counts an outcome."""
        self.counts[outcome.status] += 1
        if outcome.status == "planned" and len(self.planned) < MAX_LISTED:
            self.planned.append(outcome.name)
        self.noted += bool(outcome.notes)
        room = MAX_LISTED - len(self.notes)
        self.notes += [(outcome.name, note) for note in outcome.notes[:room]]
        if outcome.status not in ("failed", "unreadable", "unavailable"):
            return
        if len(self.problems) < MAX_LISTED:
            self.problems.append((outcome.name, outcome.reason))
        kind = _kind_of_reason(outcome.reason, outcome.name)
        if (outcome.status, kind) not in self.reasons and len(self.reasons) >= MAX_REASONS:
            kind = _OTHER
        text = _OTHER if kind == _OTHER else outcome.reason
        reason = self.reasons.setdefault((outcome.status, kind), Reason(outcome.status, text))
        reason.count += 1
        if len(reason.names) < _NAMES_OF_REASON:
            reason.names.append(outcome.name)

    def table(self) -> list[str]:
        """Lines for people: what failed and why, the most frequent first."""
        rows = sorted(self.reasons.values(), key=lambda reason: (-reason.count, reason.text))
        lines = []
        for reason in rows:
            names = ", ".join(reason.names) + (", ..." if reason.count > len(reason.names) else "")
            lines.append(f"{reason.count:>8}  {reason.status:<11}  {reason.text}  [{names}]")
        return lines

    @property
    def exit_code(self) -> int:
        """0: all has its answer or its reason. 1: a restart may read what could not be read now.
        2: nothing has an answer; the user must see why."""
        if self.counts["unavailable"]:
            return 1
        answered = self.counts["annotated"] + self.counts["skipped"] + self.counts["planned"]
        lost = self.counts["failed"] + self.counts["unreadable"]
        return 2 if lost and not answered else 0


def _kind_of_reason(text: str, name: str) -> str:
    """The reason without names and numbers."""
    for part in (name, os.path.basename(name)):
        if part:
            text = text.replace(part, "*")
    text = re.sub(r"\S*/\S*", "*", text)
    return re.sub(r"\d+(\.\d+)?", "#", text)


class Lists:
    """`problems-EXPERT.json` and `notes-EXPERT.json` beside the store, written row by row.

    They appear whole at the end. Those of an earlier run stay if this one looked at nothing new.
    """

    def __init__(self, out: paths.PathLike, expert: str) -> None:
        """Writes to temporary files until `publish`."""
        self._out = paths.as_path(out)
        self._names = {kind: f"{kind}-{expert}.json" for kind in ("problems", "notes")}
        self._files: dict[str, IO[str]] = {}

    def add(self, outcome: Outcome) -> None:
        """Lists the reason and the notes of an outcome."""
        if outcome.status in ("failed", "unreadable", "unavailable"):
            self._row("problems", outcome.name, outcome.reason)
        for note in outcome.notes:
            self._row("notes", outcome.name, note)

    def _row(self, kind: str, name: str, reason: str) -> None:
        file = self._files.get(kind)
        if file is None:
            file = self._files[kind] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
            file.write("[\n")
        else:
            file.write(",\n")
        file.write(" " + json.dumps({"input": name, "reason": reason}))

    def publish(self, *, skipped: bool) -> None:
        """Puts the lists beside the store.

        Args:
          skipped: whether some inputs were stored already, so that an earlier list may still be right.

        Raises:
          UserError: they cannot be written.
        """
        for kind, name in self._names.items():
            path = self._out / name
            file = self._files.pop(kind, None)
            if file is not None:
                with file:
                    file.write("\n]\n")
                    file.seek(0)
                    _put(file, path)
            elif not skipped:
                path.unlink(missing_ok=True)


def _put(file: IO[str], path: epath.Path) -> None:
    """Copies a file to its place; on a disk it appears whole, as in an object store."""
    temporary = path if "://" in os.fspath(path) else path.parent / f".{path.name}.partial"
    try:
        with temporary.open("w") as sink:
            shutil.copyfileobj(file, sink)
        if temporary != path:
            temporary.replace(path)
    except OSError as error:
        raise paths.write_error(path, error) from error
