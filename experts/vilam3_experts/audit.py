"""The audit log: every expert call, in chains of hashes that show what was changed afterwards.

A log is a folder:

    CHAIN-NUMBER.jsonl     lines of one chain from line NUMBER on
    manifest/CHAIN.json    length and last hash of the chain

Each writer has a chain of its own, so writers need no common lock. A line is canonical JSON (sorted keys, no
spaces) with its number (`sequence`), the hash of the line before it (`previous`), and its own (`hash`: sha256
of the line without it). The chain begins with the hash of its name. When a writer opens and closes, its line
lists the other chains that it sees, so that one which disappears with its manifest entry is still missed.

What is logged of a call: key of its input (a hash of the decoded pixels), expert, version, hash of its
weights, arguments, status, hash of the answer without its time, seconds, time of day. No path, file name or
reason of a failure, which may hold one.

**What a crash costs.** On a disk, `append` hands each line to the operating system before it returns: a
killed process loses none. Lines and manifest are on the disk (fsync) at most a second later if calls go on,
and after `sync` and `close`; a power cut loses at most what came since. An object store has no append: lines
are written as an object every `_REMOTE_SECONDS` if calls go on, and at `sync` and `close`; a killed process
loses those since.

**What it shows.** Lines that were changed, removed, moved or inserted; a chain that was cut short or removed.
Whoever can rewrite a whole chain and its manifest can forge it: keep copies of the folder `manifest`
elsewhere and give them to `verify`.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import hashlib
import io
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from etils import epath

from vilam3_experts import __version__
from vilam3_jax import paths
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import content_sha256
from vilam3_jax.errors import UserError

_SEGMENT = re.compile(r"(\d{8}T\d{6}Z-[0-9a-f]{8})-(\d{10})\.jsonl")
_HEAD = re.compile(r"(\d{8}T\d{6}Z-[0-9a-f]{8})\.json")
_SHA256 = re.compile("[0-9a-f]{64}")
_SYNC_SECONDS = 1.0
_REMOTE_SECONDS = 10.0
_MAX_LINE = 4 << 20  # an opening line lists all chains
_MAX_OBJECT = 1 << 30
_MAX_HEAD = 4096
_MAX_ARGS = 1000


class Head(NamedTuple):
    """How far a chain goes: its number of lines, and the hash of the last."""

    count: int
    hash: str


@dataclasses.dataclass(frozen=True)
class Call:
    """One logged call.

    Attributes:
      input: key of what the expert looked at, sha256 (hex).
      expert, version, args: what was called.
      weights: sha256 (hex) of its weights, '' if it has none.
      status: 'ok' or 'failed'.
      output: `content_sha256` of its answer.
      seconds: that it took.
      time: when it ended, UTC, ISO 8601.
    """

    input: str
    expert: str
    version: str
    weights: str
    args: str
    status: str
    output: str
    seconds: float
    time: str

    @classmethod
    def of(cls, annotation: Annotation) -> Call:
        """The call that gave `annotation`.

        Raises:
          ValueError: a key or digest that is no sha256, or arguments that may hold a path: these are not
            logged.
        """
        call = cls(
            input=annotation.input_key,
            expert=annotation.expert,
            version=annotation.version,
            weights=annotation.weights_sha256,
            args=annotation.args,
            status=annotation.status,
            output=content_sha256(annotation),
            seconds=round(annotation.seconds, 6),
            time=_now(),
        )
        if not _SHA256.fullmatch(call.input) or not (call.weights == "" or _SHA256.fullmatch(call.weights)):
            raise ValueError(f"call of {call.expert}: input key and weights must be sha256 to be logged")
        if len(call.args) > _MAX_ARGS or "/" in call.args or "\\" in call.args or not call.args.isprintable():
            raise ValueError(f"call of {call.expert}: its arguments are too long or hold a path, not logged")
        return call


_CALL_FIELDS = frozenset(field.name for field in dataclasses.fields(Call))


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


class AuditLog:
    """Appends to a chain of its own; safe among threads, and among processes and hosts that share a folder.

    On a disk it goes on with a chain whose writer has ended, and repairs a line that this left unfinished:
    the line stays, and a line that names its hash follows. In an object store it begins a new chain.
    """

    def __init__(self, folder: paths.PathLike) -> None:
        """Opens the log, or makes it.

        Args:
          folder: of the log, local or `gs://`.

        Raises:
          UserError: the folder cannot be written.
        """
        self._folder = paths.as_path(folder)
        self._lock = threading.Lock()
        try:
            (self._folder / "manifest").mkdir(parents=True, exist_ok=True)
            self._out: _Out = (
                _RemoteOut(self._folder) if "://" in str(self._folder) else _LocalOut(self._folder)
            )
        except OSError as error:
            raise paths.write_error(self._folder, error) from error
        try:
            if self._out.torn is not None:
                self._add({"event": "repaired", **self._out.torn})
            self._add({"event": "opened", "software": __version__, "others": self._others()})
            self._out.sync()
        except BaseException:
            self._out.close()
            raise

    @property
    def chain(self) -> str:
        """Name of the chain that this log writes."""
        return self._out.chain

    def append(self, annotation: Annotation) -> None:
        """Logs the call that gave `annotation`, a failed one too.

        Raises:
          ValueError: what must not be logged, see `Call.of`.
          UserError: the disk is full or the folder cannot be written; the log is as it was before.
        """
        call = dataclasses.asdict(Call.of(annotation))
        with self._lock:
            self._add({"event": "call", **call})

    def sync(self) -> None:
        """Returns when all that was appended is on the disk, or in the object store."""
        with self._lock:
            self._out.sync()

    def close(self) -> None:
        """Ends the run; the chain is free for another one. Closing again does nothing."""
        with self._lock:
            if self._out.closed:
                return
            try:
                self._add({"event": "closed", "others": self._others()})
                self._out.sync()
            finally:
                self._out.close()

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, fields: dict[str, Any]) -> None:
        head = self._out.head
        fields |= {"sequence": head.count, "previous": head.hash}
        fields.setdefault("time", _now())
        digest = hashlib.sha256(_canonical(fields)).hexdigest()
        line = _canonical(fields | {"hash": digest}) + b"\n"
        self._out.write(line, Head(head.count + 1, digest))

    def _others(self) -> dict[str, list[Any]]:
        known = heads(self._folder / "manifest")
        return {chain: list(head) for chain, head in known.items() if chain != self.chain}


class _Out(Protocol):
    """Where a chain's lines go.

    Attributes:
      chain: its name.
      head: of what was written.
      torn: number and sha256 of the bytes of an unfinished line; None without one.
      closed: whether it is.
    """

    chain: str
    head: Head
    torn: dict[str, Any] | None
    closed: bool

    def write(self, line: bytes, head: Head) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class _LocalOut:
    """A file that is locked while its writer lives."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self.torn: dict[str, Any] | None = None
        self.closed = False
        self._prefix = b""
        for chain, segments in sorted(_segments(folder).items(), reverse=True):
            if self._resume(chain, segments[-1][1]):
                break
        else:
            self.chain, self.head = _new_chain()
            self._file = _lock(folder / f"{self.chain}-{0:010d}.jsonl", os.O_CREAT | os.O_EXCL)
        self._synced = time.monotonic()

    def _resume(self, chain: str, path: epath.Path) -> bool:
        """Goes on with a chain unless it is in use, or not as its manifest says: that is for `verify`."""
        file = _lock(path, 0)
        if file < 0:
            return False
        found = _tail(file, chain)
        try:
            known = _read_head(self._folder / "manifest" / f"{chain}.json")
        except UserError:
            known = None
        if found is None or known is None or found[0].count < known.count:
            os.close(file)
            return False
        self.chain, self._file = chain, file
        self.head, torn = found
        if torn:
            self._prefix = b"" if torn.endswith(b"\n") else b"\n"
            torn += self._prefix
            self.torn = {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}
        return True

    def write(self, line: bytes, head: Head) -> None:
        if self.closed:
            raise ValueError("the audit log is closed")
        data = self._prefix + line
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            if os.write(self._file, data) != len(data):
                raise OSError("the disk is full")
        except OSError as error:
            try:
                os.ftruncate(self._file, end)
            except OSError:
                self.close()  # the next writer repairs the line
            raise paths.write_error(self._folder, error) from error
        self._prefix, self.head = b"", head
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise paths.write_error(self._folder, error) from error
        _write_head(self._folder, self.chain, self.head)
        self._synced = time.monotonic()

    def close(self) -> None:
        os.close(self._file)
        self.closed = True


class _RemoteOut:
    """Objects of some lines each: an object store appends nothing."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self.chain, self.head = _new_chain()
        self.torn: dict[str, Any] | None = None
        self.closed = False
        self._lines: list[bytes] = []
        self._first = 0
        self._synced = time.monotonic()

    def write(self, line: bytes, head: Head) -> None:
        if self.closed:
            raise ValueError("the audit log is closed")
        self._lines.append(line)
        self.head = head
        if time.monotonic() - self._synced >= _REMOTE_SECONDS:
            self.sync()

    def sync(self) -> None:
        if self._lines:
            name = f"{self.chain}-{self._first:010d}.jsonl"
            paths.write_bytes_atomic(self._folder / name, b"".join(self._lines))
            self._first, self._lines = self.head.count, []
            _write_head(self._folder, self.chain, self.head)
        self._synced = time.monotonic()

    def close(self) -> None:
        self.closed = True


def _new_chain() -> tuple[str, Head]:
    now = datetime.datetime.now(datetime.UTC)
    chain = f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    return chain, Head(0, _genesis(chain))


def _genesis(chain: str) -> str:
    return hashlib.sha256(chain.encode()).hexdigest()


def _lock(path: epath.Path, flags: int) -> int:
    """Opens a file for this writer alone; -1 if another has it, or if it is gone or not to be written."""
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o644)
    except (FileNotFoundError, PermissionError):
        if flags:
            raise
        return -1
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return -1
    return file


def _tail(file: int, chain: str) -> tuple[Head, bytes] | None:
    """The head of a chain's file, and the bytes behind its last whole line; None if that line is damaged."""
    size = os.lseek(file, 0, os.SEEK_END)
    end = os.pread(file, min(size, _MAX_LINE), max(0, size - _MAX_LINE))
    whole, newline, torn = end.rpartition(b"\n")
    if not newline:
        return (Head(0, _genesis(chain)), torn) if size <= _MAX_LINE else None
    line = _parse(whole.rpartition(b"\n")[2] + b"\n")
    return None if line is None else (Head(line["sequence"] + 1, line["hash"]), torn)


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _parse(raw: bytes) -> dict[str, Any] | None:
    """A line's fields, None if it is not as it was written."""
    try:
        fields = json.loads(raw)
        bare = {name: value for name, value in fields.items() if name != "hash"}
        whole = (
            hashlib.sha256(_canonical(bare)).hexdigest() == fields["hash"]
            and _canonical(fields) + b"\n" == raw
            and isinstance(fields["sequence"], int)
            and isinstance(fields["previous"], str)
            and isinstance(fields["event"], str)
            and all(
                isinstance(count, int) and isinstance(last, str)
                for count, last in fields.get("others", {}).values()
            )
            and (fields["event"] != "call" or fields.keys() >= _CALL_FIELDS)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return fields if whole else None


def _segments(folder: epath.Path) -> dict[str, list[tuple[int, epath.Path]]]:
    """The files of every chain, in the order of their first lines."""
    found: dict[str, list[tuple[int, epath.Path]]] = {}
    for path in paths.children(folder):
        if match := _SEGMENT.fullmatch(path.name):
            found.setdefault(match[1], []).append((int(match[2]), path))
    return {chain: sorted(segments) for chain, segments in found.items()}


def _write_head(folder: epath.Path, chain: str, head: Head) -> None:
    text = _canonical({"chain": chain, "count": head.count, "hash": head.hash})
    paths.write_bytes_durable(folder / "manifest" / f"{chain}.json", text + b"\n")


def _read_head(path: epath.Path) -> Head:
    """An entry of the manifest, or of a copy of it.

    Raises:
      UserError: missing or damaged.
    """
    try:
        fields = json.loads(paths.read_bytes(path, _MAX_HEAD))
        head = Head(int(fields["count"]), str(fields["hash"]))
        if head.count < 0 or not _SHA256.fullmatch(head.hash):
            raise ValueError("no head of a chain")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged entry of the audit manifest ({error}); restore it") from error
    return head


def heads(manifest: paths.PathLike) -> dict[str, Head]:
    """Reads a manifest: chain to head.

    A copy that is kept elsewhere proves to `verify` that no chain was written anew.

    Args:
      manifest: the folder `manifest` of a log, or a copy of it.

    Raises:
      UserError: an entry is damaged.
    """
    entries = ((path, _HEAD.fullmatch(path.name)) for path in paths.children(manifest))
    return {match[1]: _read_head(path) for path, match in entries if match}


def _lines(segments: list[tuple[int, epath.Path]]) -> Iterator[bytes]:
    """Lines with their ends; the last one of a file may lack it."""
    for _, path in segments:
        if "://" in str(path):
            yield from io.BytesIO(paths.read_bytes(path, _MAX_OBJECT))
            continue
        try:
            with open(path, "rb") as file:
                while line := file.readline(_MAX_LINE):
                    yield line
        except OSError as error:
            paths.check_passing(path, error)
            raise UserError(f"{path}: cannot be read ({error}); check the path") from error


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
        self.head = Head(0, _genesis(name))
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
        fields = _parse(raw)
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
                listed[match[1]] = _read_head(path)
            except UserError as error:
                problems.append(Problem(match[1], 0, str(error)))
                listed[match[1]] = Head(0, _genesis(match[1]))
    for source in (listed, known or {}):
        for chain, head in source.items():
            claims.setdefault(chain, {}).setdefault(head.count, head.hash)
            if claims[chain][head.count] != head.hash:
                problems.append(Problem(chain, head.count, "the manifest was changed since it was copied"))
    segments = _segments(folder)
    checked: dict[str, _Chain] = {}
    for chain, files in segments.items():
        state = _Chain(chain, claims.get(chain, {}), max(claims.get(chain, {}), default=0))
        for raw in _lines(files):
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


def calls(folder: paths.PathLike) -> Iterator[Call]:
    """Yields every logged call, chain by chain. Damaged lines are left out: `verify` first."""
    for files in _segments(paths.as_path(folder)).values():
        for raw in _lines(files):
            fields = _parse(raw)
            if fields is not None and fields["event"] == "call":
                yield Call(**{name: fields[name] for name in _CALL_FIELDS})


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What `replay` found.

    Attributes:
      same: number of calls that gave the same answer.
      different: calls that gave another, each with the hash of that answer.
      missing: calls whose input, expert, version or weights were not at hand.
    """

    same: int
    different: tuple[tuple[Call, str], ...]
    missing: tuple[Call, ...]

    @property
    def ok(self) -> bool:
        return not self.different and not self.missing


def replay(folder: paths.PathLike, answer: Callable[[Call], Annotation | None]) -> Replayed:
    """Makes the logged calls again and compares the answers. Equal calls with equal answers are made once.

    Args:
      folder: of the log.
      answer: makes one call; None where its input, expert, version or weights are not at hand.
    """
    same, different, missing = 0, [], []
    seen: set[tuple[str, ...]] = set()
    for call in calls(folder):
        identity = (call.input, call.expert, call.version, call.weights, call.args, call.output)
        if identity in seen:
            continue
        seen.add(identity)
        annotation = answer(call)
        if annotation is None:
            missing.append(call)
            continue
        output = content_sha256(annotation)
        if output == call.output:
            same += 1
        else:
            different.append((call, output))
    return Replayed(same, tuple(different), tuple(missing))
