"""Verifying the audit log."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping

from vilam3_experts.audit.chain import (
    Head,
    chain_files,
    genesis,
    parse_line,
    read_head,
    read_lines,
)
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_HEAD = re.compile(r"(\d{8}T\d{6}Z-[0-9a-f]{8})\.json")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a log: in which chain, at which line (from 1; 0 for the chain as a whole)."""

    chain: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"chain {self.chain}" + (f", line {self.line}" if self.line else "") + f": {self.text}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
      chains: number of chains.
      calls: number of calls in them.
      problems: what was tampered with or lost.
      notes: what a crash explains.
    """

    chains: int
    calls: int
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


class _Chain:
    """Checks one chain, line by line."""

    def __init__(self, name: str, expected: Mapping[int, str], committed: int) -> None:
        """Begins before the first line.

        Args:
          name: of the chain.
          expected: number of lines to the hash that the last of them must have.
          committed: number of lines that must be there.
        """
        self.name = name
        self.head = Head(0, genesis(name))
        self.calls = 0
        self.others: dict[str, Head] = {}
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []
        self._expected, self._committed = expected, committed
        self._number = 0
        self._strange: list[bytes] = []

    def problem(self, text: str, line: int | None = None) -> None:
        self.problems.append(Problem(self.name, self._number if line is None else line, text))

    def line(self, raw: bytes) -> None:
        self._number += 1
        fields = parse_line(raw)
        if fields is None:
            self._strange.append(raw)
            return
        strange, self._strange = self._strange, []
        count, previous = self.head
        if strange:
            torn = b"".join(strange)
            first = self._number - len(strange)
            repaired = fields["event"] == "repaired"
            known = (fields.get("torn_bytes"), fields.get("torn_sha256"))
            if repaired and known == (len(torn), hashlib.sha256(torn).hexdigest()):
                self.notes.append(Problem(self.name, first, "was left unfinished, and repaired"))
            else:
                self.problem("was changed", first)
            if not repaired:
                count, previous = count + len(strange), fields["previous"]
        if fields["sequence"] > count:
            self.problem(f"lines before it were removed: {fields['sequence'] - count}")
        elif fields["sequence"] < count:
            self.problem("was moved here, or inserted")
        elif fields["previous"] != previous:
            self.problem("does not go on from the line before it: one of them was exchanged")
        self.head = Head(fields["sequence"] + 1, fields["hash"])
        if self._expected.get(self.head.count, self.head.hash) != self.head.hash:
            self.problem("is not the line that the manifest names: the chain was written anew")
        self.calls += fields["event"] == "call"
        for chain, head in fields.get("others", {}).items():
            self.others[chain] = Head(*head)

    def end(self) -> None:
        """To be called behind the last line."""
        missing = self._committed - self.head.count
        if missing > 0:
            what = "was cut or changed" if self._strange else "ends too early"
            self.problem(f"{what}: {missing} of {self._committed} lines are missing", 0)
        elif self._strange:
            self.notes.append(Problem(self.name, self._number, "is unfinished; the next writer repairs it"))


def verify(folder: paths.PathLike, known: Mapping[str, Head] | None = None) -> Report:
    """Checks every chain of a log, its manifest, and what chains say of each other.

    Args:
      folder: of the log, local or `gs://`; writers may be at work.
      known: heads from an earlier copy of the manifest, which must still lie on the chains.

    Raises:
      UserError: no log there.
      UnavailableError: the disk or the network fails.
    """
    folder = paths.as_path(folder)
    if not (folder / "manifest").is_dir():
        raise UserError(f"{folder}: no audit log; give the folder that holds its `manifest`")
    problems: list[Problem] = []
    claims: dict[str, dict[int, str]] = {}
    # The manifest first: a chain that grows meanwhile is longer than its entry, never shorter.
    listed: dict[str, Head] = {}
    for path in paths.children(folder / "manifest"):
        if match := _HEAD.fullmatch(path.name):
            try:
                listed[match[1]] = read_head(path)
            except UserError as error:
                problems.append(Problem(match[1], 0, str(error)))
                listed[match[1]] = Head(0, genesis(match[1]))
    for source in (listed, known or {}):
        for chain, head in source.items():
            claims.setdefault(chain, {}).setdefault(head.count, head.hash)
            if claims[chain][head.count] != head.hash:
                problems.append(Problem(chain, head.count, "the manifest was changed since it was copied"))
    segments = chain_files(folder)
    checked: dict[str, _Chain] = {}
    for chain, files in segments.items():
        state = _Chain(chain, claims.get(chain, {}), max(claims.get(chain, {}), default=0))
        for raw in read_lines(files):
            state.line(raw)
        state.end()
        if chain not in listed and state.head.count > 1:
            state.problem("its entry in the manifest was removed, or it was inserted", 0)
        checked[chain] = state
    seen: dict[str, Head] = {}
    for state in checked.values():
        for chain, head in state.others.items():
            seen[chain] = max(head, seen.get(chain, head))
    for chain in sorted({*claims, *seen} - set(segments)):
        problems.append(Problem(chain, 0, "was removed"))
    for chain, head in seen.items():
        if chain in checked and checked[chain].head.count < head.count and not checked[chain].problems:
            problems.append(Problem(chain, 0, f"ends too early: another chain saw {head.count} lines of it"))
    states = checked.values()
    return Report(
        chains=len(checked),
        calls=sum(state.calls for state in states),
        problems=(*problems, *(p for state in states for p in state.problems)),
        notes=tuple(note for state in states for note in state.notes),
    )
