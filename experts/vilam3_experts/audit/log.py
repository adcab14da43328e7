"""Writes the audit log."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
import time
from typing import Any

import filelock
from etils import epath

from vilam3_experts import __version__
from vilam3_experts.audit import chain as chains
from vilam3_experts.audit.chain import Call, Head, canonical
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_SYNC_SECONDS = 1.0
_REMOTE_SECONDS = 10.0


class AuditLog(contextlib.AbstractContextManager):
    """Appends to one chain; safe for threads, and for processes and hosts that share a folder.

    On a disk it continues a chain whose writer has ended. An unfinished last line is kept, and followed by a
    line with its hash. In an object store it starts a new chain.
    """

    def __init__(self, folder: paths.PathLike) -> None:
        """Opens or creates the log in a local or `gs://` folder; raises `UserError` if it is not writable."""
        self._folder = paths.as_path(folder)
        self._lock = threading.Lock()
        try:
            (self._folder / "manifest").mkdir(parents=True, exist_ok=True)
            self._out = (_RemoteOut if "://" in str(self._folder) else _LocalOut)(self._folder)
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
        """Logs the call that returned `annotation`, also a failed one.

        Raises `ValueError` if the call must not be logged, see `Call.of`, and `UserError` if the folder
        cannot be written. In both cases the log is unchanged.
        """
        call = dataclasses.asdict(Call.of(annotation))
        with self._lock:
            self._add({"event": "call", **call})

    def sync(self) -> None:
        """Returns when all appended lines are on the disk, or in the object store."""
        with self._lock:
            self._out.sync()

    def close(self) -> None:
        """Ends the run and frees the chain for another writer. Can be called more than once."""
        with self._lock:
            if self._out.closed:
                return
            try:
                self._add({"event": "closed", "others": self._others()})
                self._out.sync()
            finally:
                self._out.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, fields: dict[str, Any]) -> None:
        head = self._out.head
        fields |= {"sequence": head.count, "previous": head.hash}
        fields.setdefault("time", chains.timestamp())
        digest = hashlib.sha256(canonical(fields)).hexdigest()
        line = canonical(fields | {"hash": digest}) + b"\n"
        self._out.write(line, Head(head.count + 1, digest))

    def _others(self) -> dict[str, list[Any]]:
        heads = chains.heads(self._folder / "manifest")
        return {chain: list(head) for chain, head in heads.items() if chain != self.chain}


class _Out:
    """Destination of a chain's lines; `torn` has the size and sha256 of an unfinished line."""

    def __init__(self, folder: epath.Path, sync_seconds: float) -> None:
        self._folder, self._sync_seconds = folder, sync_seconds
        self.chain, self.head = chains.new_chain()
        self.torn: dict[str, Any] | None = None
        self.closed = False
        self._synced = time.monotonic()

    def write(self, line: bytes, head: Head) -> None:
        if self.closed:
            raise ValueError("the audit log is closed")
        self._append(line, head)
        if time.monotonic() - self._synced >= self._sync_seconds:
            self.sync()

    def sync(self) -> None:
        self._flush()
        self._synced = time.monotonic()

    def close(self) -> None:
        self.closed = True

    def _append(self, line: bytes, head: Head) -> None: ...
    def _flush(self) -> None: ...


class _LocalOut(_Out):
    """A file that stays locked while its writer lives."""

    def __init__(self, folder: epath.Path) -> None:
        super().__init__(folder, _SYNC_SECONDS)
        self._prefix = b""
        for chain, segments in sorted(chains.chain_files(folder).items(), reverse=True):
            if self._resume(chain, segments[-1][1]):
                return
        self._file = _lock(folder / f"{self.chain}-{0:010d}.jsonl", os.O_CREAT | os.O_EXCL)

    def _resume(self, chain: str, path: epath.Path) -> bool:
        """Continues a chain, unless it is in use or contradicts its manifest, which `verify` must report."""
        file = _lock(path, 0)
        if file < 0:
            return False
        found = chains.read_tail(file, chain)
        try:
            listed = chains.read_head(self._folder / "manifest" / f"{chain}.json")
        except UserError:
            listed = None
        if found is None or listed is None or found[0].count < listed.count:
            os.close(file)
            return False
        self.chain, self._file = chain, file
        self.head, torn = found
        if torn:
            self._prefix = b"" if torn.endswith(b"\n") else b"\n"
            torn += self._prefix
            self.torn = {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}
        return True

    def _append(self, line: bytes, head: Head) -> None:
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

    def _flush(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise paths.write_error(self._folder, error) from error
        chains.write_head(self._folder, self.chain, self.head)

    def close(self) -> None:
        os.close(self._file)
        super().close()


class _RemoteOut(_Out):
    """Objects of several lines each, because object stores cannot append."""

    def __init__(self, folder: epath.Path) -> None:
        super().__init__(folder, _REMOTE_SECONDS)
        self._lines: list[bytes] = []
        self._first = 0

    def _append(self, line: bytes, head: Head) -> None:
        self._lines.append(line)
        self.head = head

    def _flush(self) -> None:
        if self._lines:
            name = f"{self.chain}-{self._first:010d}.jsonl"
            paths.write_bytes_atomic(self._folder / name, b"".join(self._lines))
            self._first, self._lines = self.head.count, []
            chains.write_head(self._folder, self.chain, self.head)


def _lock(path: epath.Path, flags: int) -> int:
    """Opens and locks a file; -1 if it is locked by another writer, missing or not writable."""
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o644)
    except (FileNotFoundError, PermissionError):
        if flags:
            raise
        return -1
    # Not `locks.try_lock`: without locks, two writers would continue one chain.
    if filelock.lock_descriptor(file, blocking=False):
        return file
    os.close(file)
    return -1
