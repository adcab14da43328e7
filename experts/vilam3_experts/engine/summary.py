"""What a run did, in bounded memory."""

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

from vilam3_experts.engine.job import Outcome
from vilam3_jax.runtime import paths

MAX_LISTED = 1000
MAX_REASONS = 200
_NAMES_PER_REASON = 3
_OTHER = "other reasons, see the list"
_UNANSWERED = ("failed", "unreadable", "unavailable")


@dataclasses.dataclass
class Reason:
    """Why some inputs have no answer: the text of the first one, their number, and the first few names."""

    status: str
    text: str
    count: int = 0
    names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RunSummary:
    """What a run did.

    `counts` are by `Outcome.status`. `planned` lists the first `MAX_LISTED` names; `noted` counts the inputs
    with notes. `reasons` groups reasons that differ only in names and numbers.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    planned: list[str] = dataclasses.field(default_factory=list)
    noted: int = 0
    reasons: dict[tuple[str, str], Reason] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """The counts as one line of text."""
        names = ["annotated", "skipped", "failed", "unreadable"]
        names += [name for name in ("unavailable", "planned") if self.counts[name]]
        return ", ".join(f"{self.counts[n]} {n}" for n in names)

    def add(self, outcome: Outcome) -> None:
        """Counts an outcome."""
        self.counts[outcome.status] += 1
        if outcome.status == "planned" and len(self.planned) < MAX_LISTED:
            self.planned.append(outcome.name)
        self.noted += bool(outcome.notes)
        if outcome.status not in _UNANSWERED:
            return
        pattern = _reason_pattern(outcome.reason, outcome.name)
        if (outcome.status, pattern) not in self.reasons and len(self.reasons) >= MAX_REASONS:
            pattern = _OTHER
        text = _OTHER if pattern == _OTHER else outcome.reason
        reason = self.reasons.setdefault((outcome.status, pattern), Reason(outcome.status, text))
        reason.count += 1
        if len(reason.names) < _NAMES_PER_REASON:
            reason.names.append(outcome.name)

    def table(self) -> list[str]:
        """The reasons as lines of text, the most frequent first."""
        lines = []
        for reason in sorted(self.reasons.values(), key=lambda reason: (-reason.count, reason.text)):
            names = ", ".join(reason.names) + (", ..." if reason.count > len(reason.names) else "")
            lines.append(f"{reason.count:>8}  {reason.status:<11}  {reason.text}  [{names}]")
        return lines

    @property
    def exit_code(self) -> int:
        """0: every input has an answer or a permanent reason. 1: some could not be read now, a restart may
        read them. 2: no input has an answer."""
        if self.counts["unavailable"]:
            return 1
        answered = self.counts["annotated"] + self.counts["skipped"] + self.counts["planned"]
        lost = self.counts["failed"] + self.counts["unreadable"]
        return 2 if lost and not answered else 0


def _reason_pattern(text: str, name: str) -> str:
    """The reason without names and numbers."""
    for part in (name, os.path.basename(name)):
        if part:
            text = text.replace(part, "*")
    text = re.sub(r"\S*/\S*", "*", text)
    return re.sub(r"\d+(\.\d+)?", "#", text)


class ProblemLists:
    """`problems-EXPERT.json` and `notes-EXPERT.json` in the store.

    Rows go to temporary files until `publish`.
    """

    def __init__(self, out: paths.PathLike, expert: str) -> None:
        self._out = paths.as_path(out)
        self._names = {kind: f"{kind}-{expert}.json" for kind in ("problems", "notes")}
        self._files: dict[str, IO[str]] = {}

    def add(self, outcome: Outcome) -> None:
        """Adds the reason and the notes of an outcome."""
        if outcome.status in _UNANSWERED:
            self.add_row("problems", outcome.name, outcome.reason)
        for note in outcome.notes:
            self.add_row("notes", outcome.name, note)

    def add_row(self, kind: str, name: str, reason: str) -> None:
        file = self._files.get(kind)
        if file is None:
            file = self._files[kind] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
            file.write("[\n")
        else:
            file.write(",\n")
        file.write(" " + json.dumps({"input": name, "reason": reason}))

    def publish(self, *, skipped: bool) -> None:
        """Moves the lists to the store; raises `UserError` if they cannot be written.

        If inputs were `skipped`, an existing list is kept where there is no new one.
        """
        for kind, name in self._names.items():
            path = self._out / name
            file = self._files.pop(kind, None)
            if file is not None:
                with file:
                    file.write("\n]\n")
                    file.seek(0)
                    _copy_atomic(file, path)
            elif not skipped:
                path.unlink(missing_ok=True)


def _copy_atomic(file: IO[str], path: epath.Path) -> None:
    temporary = path if "://" in os.fspath(path) else path.parent / f".{path.name}.partial"
    try:
        with temporary.open("w") as sink:
            shutil.copyfileobj(file, sink)
        if temporary != path:
            temporary.replace(path)
    except OSError as error:
        raise paths.write_error(path, error) from error
