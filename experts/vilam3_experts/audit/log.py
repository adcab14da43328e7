"""Writing the audit log."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import threading
import time
from types import TracebackType
from typing import Any, Protocol

from etils import epath

from vilam3_experts import __version__
from vilam3_experts.audit.chain import (
    Call,
    Head,
    canonical,
    chain_files,
    heads,
    new_chain,
    read_head,
    read_tail,
    timestamp,
    write_head,
)
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_SYNC_SECONDS = 1.0
_REMOTE_SECONDS = 10.0


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
        fields.setdefault("time", timestamp())
        digest = hashlib.sha256(canonical(fields)).hexdigest()
        line = canonical(fields | {"hash": digest}) + b"\n"
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
        for chain, segments in sorted(chain_files(folder).items(), reverse=True):
            if self._resume(chain, segments[-1][1]):
                break
        else:
            self.chain, self.head = new_chain()
            self._file = _lock(folder / f"{self.chain}-{0:010d}.jsonl", os.O_CREAT | os.O_EXCL)
        self._synced = time.monotonic()

    def _resume(self, chain: str, path: epath.Path) -> bool:
        """Goes on with a chain unless it is in use, or not as its manifest says: that is for `verify`."""
        file = _lock(path, 0)
        if file < 0:
            return False
        found = read_tail(file, chain)
        try:
            known = read_head(self._folder / "manifest" / f"{chain}.json")
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
        write_head(self._folder, self.chain, self.head)
        self._synced = time.monotonic()

    def close(self) -> None:
        os.close(self._file)
        self.closed = True


class _RemoteOut:
    """Objects of some lines each: an object store appends nothing."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self.chain, self.head = new_chain()
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
            write_head(self._folder, self.chain, self.head)
        self._synced = time.monotonic()

    def close(self) -> None:
        self.closed = True


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
