"""Verifies and replays the audit log."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

from vilam3_experts.audit import chain as chains
from vilam3_experts.audit.chain import Call, Head
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import content_sha256
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem of a log, with its chain and line (from 1; 0 for the chain as a whole)."""

    chain: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"chain {self.chain}" + (f", line {self.line}" if self.line else "") + f": {self.text}"


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `verify`. Problems are tampering or loss, notes are traces of crashes."""

    chains: int
    calls: int
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


class _ChainVerifier:
    """Verifies one chain, line by line.

    `expected` maps a number of lines to the hash that the last of them must have; at least `committed` lines
    must exist.
    """

    def __init__(self, name: str, expected: Mapping[int, str], committed: int) -> None:
        self.name = name
        self.head = Head(0, chains.genesis(name))
        self.calls = 0
        self.others: dict[str, Head] = {}
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []
        self._expected, self._committed = expected, committed
        self._number = 0
        self._invalid: list[bytes] = []

    def problem(self, text: str, line: int | None = None) -> None:
        self.problems.append(Problem(self.name, self._number if line is None else line, text))

    def line(self, raw: bytes) -> None:
        self._number += 1
        fields = chains.parse_line(raw)
        if fields is None:
            self._invalid.append(raw)
            return
        invalid, self._invalid = self._invalid, []
        count, previous = self.head
        if invalid:
            torn = b"".join(invalid)
            first = self._number - len(invalid)
            repaired = fields["event"] == "repaired"
            stated = (fields.get("torn_bytes"), fields.get("torn_sha256"))
            if repaired and stated == (len(torn), hashlib.sha256(torn).hexdigest()):
                self.notes.append(Problem(self.name, first, "was left unfinished, and repaired"))
            else:
                self.problem("was changed", first)
            if not repaired:
                count, previous = count + len(invalid), fields["previous"]
        if fields["sequence"] > count:
            self.problem(f"lines before it were removed: {fields['sequence'] - count}")
        elif fields["sequence"] < count:
            self.problem("was moved here, or inserted")
        elif fields["previous"] != previous:
            self.problem("does not continue the line before it: one of them was replaced")
        self.head = Head(fields["sequence"] + 1, fields["hash"])
        if self._expected.get(self.head.count, self.head.hash) != self.head.hash:
            self.problem("differs from the manifest: the chain was rewritten")
        self.calls += fields["event"] == "call"
        for chain, head in fields.get("others", {}).items():
            self.others[chain] = Head(*head)

    def end(self) -> None:
        """Call after the last line."""
        missing = self._committed - self.head.count
        if missing > 0:
            what = "was cut or changed" if self._invalid else "ends too early"
            self.problem(f"{what}: {missing} of {self._committed} lines are missing", 0)
        elif self._invalid:
            self.notes.append(Problem(self.name, self._number, "is unfinished; the next writer repairs it"))


def verify(folder: paths.PathLike, known: Mapping[str, Head] | None = None) -> Report:
    """Verifies every chain of a log against the manifest and against the heads that other chains list.

    Writers may be active. `known` are the heads of an earlier copy of the manifest, which must still match.
    Raises `UserError` if there is no log, and `UnavailableError` if the disk or the network fails.
    """
    folder = paths.as_path(folder)
    if not (folder / "manifest").is_dir():
        raise UserError(f"{folder}: no audit log; give the folder that holds its `manifest`")
    problems: list[Problem] = []
    expected: dict[str, dict[int, str]] = {}
    # Read the manifest first: a chain that grows meanwhile is longer than its entry, never shorter.
    listed: dict[str, Head] = {}
    for chain, path in chains.head_files(folder / "manifest").items():
        try:
            listed[chain] = chains.read_head(path)
        except UserError as error:
            problems.append(Problem(chain, 0, str(error)))
            listed[chain] = Head(0, chains.genesis(chain))
    for source in (listed, known or {}):
        for chain, head in source.items():
            expected.setdefault(chain, {}).setdefault(head.count, head.hash)
            if expected[chain][head.count] != head.hash:
                problems.append(Problem(chain, head.count, "the manifest was changed since it was copied"))
    segments = chains.chain_files(folder)
    verified: dict[str, _ChainVerifier] = {}
    for chain, files in segments.items():
        state = _ChainVerifier(chain, expected.get(chain, {}), max(expected.get(chain, {}), default=0))
        for raw in chains.read_lines(files):
            state.line(raw)
        state.end()
        if chain not in listed and state.head.count > 1:
            state.problem("its entry in the manifest was removed, or it was inserted", 0)
        verified[chain] = state
    seen: dict[str, Head] = {}
    for state in verified.values():
        for chain, head in state.others.items():
            seen[chain] = max(head, seen.get(chain, head))
    for chain in sorted({*expected, *seen} - set(segments)):
        problems.append(Problem(chain, 0, "was removed"))
    for chain, head in seen.items():
        if chain in verified and verified[chain].head.count < head.count and not verified[chain].problems:
            problems.append(Problem(chain, 0, f"ends too early: another chain saw {head.count} lines of it"))
    states = verified.values()
    return Report(
        chains=len(verified),
        calls=sum(state.calls for state in states),
        problems=(*problems, *(p for state in states for p in state.problems)),
        notes=tuple(note for state in states for note in state.notes),
    )


@dataclasses.dataclass(frozen=True)
class ReplayReport:
    """Result of `replay`.

    `same` counts calls with the same answer, `different` has other answers with their hash, and `missing` the
    calls whose input, expert, version or weights were not available.
    """

    same: int
    different: tuple[tuple[Call, str], ...]
    missing: tuple[Call, ...]

    @property
    def ok(self) -> bool:
        return not self.different and not self.missing


def replay(folder: paths.PathLike, answer: Callable[[Call], Annotation | None]) -> ReplayReport:
    """Repeats the logged calls and compares the answers. Calls with equal answers are repeated once.

    `answer` makes one call, or returns None if its input, expert, version or weights are not available.
    """
    same, different, missing = 0, [], []
    seen: set[tuple[str, ...]] = set()
    for call in chains.calls(folder):
        identity = (call.input, call.expert, call.version, call.weights, call.args, call.output)
        if identity in seen:
            continue
        seen.add(identity)
        annotation = answer(call)
        if annotation is None:
            missing.append(call)
        elif (output := content_sha256(annotation)) == call.output:
            same += 1
        else:
            different.append((call, output))
    return ReplayReport(same, tuple(different), tuple(missing))
