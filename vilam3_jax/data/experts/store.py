"""The annotation store: ArrayRecord shards, and an index (`index.py`) of their records.

A store is a folder:

    annotations-RUN-NUMBER.array_record   records, one per group
    annotations-RUN-NUMBER.index          index of that shard, written after it
    merged-RUN.index                      merged index, written by `compact`

Readers ignore shards that no index names. Files appear whole and never change. Only `compact` removes files,
namely those it replaced.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from vilam3_jax.data.experts import index as index_lib
from vilam3_jax.data.experts import store_files as files
from vilam3_jax.data.experts.index import Entry, Index, Location, Outcome, Shard
from vilam3_jax.data.experts.record import Annotation, Key
from vilam3_jax.data.shards import ShardReaders
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import locks, paths

SHARD_BYTES = 256 << 20
_LEASE = ".compacting"
_LEASE_SECONDS = 3600.0
_ABANDONED_SECONDS = 24 * 3600.0  # age at which a file that no index names may be removed


def content_sha256(annotation: Annotation) -> str:
    """SHA-256 (hex) of a record with `seconds` set to 0: equal for equal answers, whatever time they took."""
    return hashlib.sha256(dataclasses.replace(annotation, seconds=0.0).to_bytes()).hexdigest()


class AnnotationWriter:
    """Adds annotations to a folder. It may be killed at any moment and started again.

    Each run writes its own shards. Records go to a hidden temporary file, which is renamed when the shard is
    full; its index is written after that. Readers ignore a shard without an index, so they never see half a
    shard, and several writers on several hosts may share a folder. Both files are on the disk (fsync) before
    `flush` returns.

    A writer does not see records committed by others after it was opened: two writers given the same work
    both do it, and the store keeps one of the answers.
    """

    def __init__(
        self, directory: paths.PathLike, *, records_per_shard: int = 256, seconds_per_shard: float = 30.0
    ) -> None:
        """Opens or creates the store and reads its keys.

        Args:
          directory: local or `gs://` folder.
          records_per_shard, seconds_per_shard: a shard is committed when it reaches one of these limits or
            `SHARD_BYTES`, so a kill loses at most that much work.

        Raises:
          UserError: the folder cannot be created or an index in it is damaged.
        """
        self.directory = paths.as_path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be created ({error}); choose another folder") from error
        self._index = files.load(self.directory).index
        self._limits = (records_per_shard, seconds_per_shard)
        self._run = files.run_name()
        self._shards = 0
        # Later than every stored record, even if the clock of this host is behind.
        self._stamp = self._index.latest_stamp()
        self._pending: list[tuple[Entry, bytes]] = []
        self._pending_status: dict[Key, str] = {}
        self._bytes = 0
        self._started = time.monotonic()

    def status(self, input_key: str, expert: str, args: str = "") -> str | None:
        """'ok', 'failed', or None if the key is not stored."""
        key = (input_key, expert, args)
        if key in self._pending_status:
            return self._pending_status[key]
        found = self._index.find(key)
        return None if found is None else found.outcome.status

    def write(self, annotation: Annotation) -> bool:
        """Adds one record, unless its key is stored already; a success replaces a failure.

        Returns whether it was added. Raises `UserError` if the full shard cannot be written; its records stay
        pending.
        """
        present = self.status(*annotation.key)
        if present == "ok" or (present == "failed" and annotation.status == "failed"):
            return False
        if not self._pending:
            self._started = time.monotonic()
        data = annotation.to_bytes()
        self._stamp = max(self._stamp + 1, time.time_ns())
        content = bytes.fromhex(content_sha256(annotation))
        entry = Entry(annotation.key, annotation.version, annotation.status, content, self._stamp)
        self._pending.append((entry, data))
        self._pending_status[annotation.key] = annotation.status
        self._bytes += len(data)
        records, seconds = self._limits
        elapsed = time.monotonic() - self._started
        if len(self._pending) >= records or self._bytes >= SHARD_BYTES or elapsed >= seconds:
            self.flush()
        return True

    def flush(self) -> None:
        """Commits the pending records: writes the shard, renames it, writes its index.

        Raises `UserError` if the folder cannot be written; the records stay pending.
        """
        if not self._pending:
            return
        name = f"annotations-{self._run}-{self._shards:05d}"
        records = (data for _, data in self._pending)
        shard = files.write_shard(self.directory, name + files.SHARD_SUFFIX, records)
        entries = [entry for entry, _ in self._pending]
        shard_index = Index()
        shard_index.add_shard(shard, entries)
        content = shard_index.to_bytes()
        paths.write_bytes_durable(self.directory / (name + files.INDEX_SUFFIX), content)
        self._index.add_shard(shard, entries)
        self._index.merge_similar_layers()
        self._shards += 1
        self._pending, self._pending_status, self._bytes = [], {}, 0

    def __enter__(self) -> AnnotationWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()  # after an error too: each pending record is complete


def new_store(directory: paths.PathLike) -> AnnotationWriter:
    """Opens a folder for a changed copy of another store; raises `UserError` if it holds records."""
    writer = AnnotationWriter(directory)
    if len(writer._index):
        raise UserError(f"{directory}: holds records, which never change; give a new folder as --out")
    return writer


class AnnotationStore:
    """Random access to the annotations of a folder, written by any number of runs.

    A store shows the records committed before it was opened, even while the folder is compacted: records of
    removed shards are looked up again. Pickles hold the names of the index files.
    """

    def __init__(self, directory: paths.PathLike) -> None:
        """Reads the indexes; opens no shard yet.

        Raises `UserError` for a missing folder or damaged index, or `UnavailableError`.
        """
        self.directory = files.existing_folder(directory)
        self._open(None)

    def _open(self, names: frozenset[str] | None) -> None:
        self._index, self._names, _ = files.load(self.directory, names)
        self._current = self._index  # where the records are now; reloaded after a compaction
        self._readers = ShardReaders(self.directory)
        self._digest: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": os.fspath(self.directory), "names": self._names, "digest": self.digest()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.directory = paths.as_path(state["directory"])
        self._open(state["names"])
        if self._names != state["names"] and self.digest() != state["digest"]:
            raise UnavailableError(
                f"{self.directory}: was compacted and has other answers than when it was opened; start again"
            )

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and len(key) == 3 and self._index.find(key) is not None

    def keys(self) -> Iterator[Key]:
        """Yields every key, in an order that depends on the keys alone."""
        return self._index.keys()

    def digest(self, expert: str | None = None) -> str:
        """SHA-256 (hex) of all answers, or of one expert's; see `Index.digest`."""
        if expert is not None:
            return self._index.digest(expert)
        if self._digest is None:
            self._digest = self._index.digest()
        return self._digest

    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None:
        """Returns the annotation of a key, or None.

        Raises `UnavailableError` for an unreadable shard, `UserError` for a damaged annotation.
        """
        key = (input_key, expert, args)
        found = self._index.find(key)
        if found is None:
            return None
        location = found if self._current is self._index else self._relocated(key, found)
        try:
            data = files.read_record(self._readers, self.directory, location.shard, location.record)
        except UnavailableError:
            if paths.exists(self.directory / location.shard):
                raise
            self._current = files.load(self.directory).index
            location = self._relocated(key, found)
            data = files.read_record(self._readers, self.directory, location.shard, location.record)
        annotation = Annotation.from_bytes(data)
        if annotation.key != key:
            raise UserError(
                f"{self.directory / location.shard}: record {location.record} does not match its index; "
                "delete both and annotate again"
            )
        return annotation

    def _relocated(self, key: Key, known: Location) -> Location:
        found = self._current.find(key)
        if found is None or found.stamp != known.stamp:
            raise UnavailableError(
                f"{self.directory}: the answer of {key[1]} on {key[0][:12]} was replaced since this store "
                "was opened; start again"
            )
        return found


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """Size and content of a store."""

    records: int  # number of keys
    calls: dict[Outcome, int]  # number of keys per expert, argument, version and status
    stored: int  # number of records, including those replaced by later ones
    shards: int  # number of shards
    shard_bytes: int  # their total size
    indexes: int  # number of index files
    index_bytes: int  # their total size
    digest: str  # SHA-256 (hex) of the answers, see `Index.digest`


def store_info(directory: paths.PathLike) -> StoreInfo:
    """Summarises a store from its indexes; opens no shard and raises as `AnnotationStore`."""
    return _info(files.load(files.existing_folder(directory)))


def _info(store: files.LoadedIndex) -> StoreInfo:
    shards = store.index.shards
    return StoreInfo(
        records=len(store.index),
        calls=dict(sorted(store.index.counts().items())),
        stored=sum(shard.records for shard in shards),
        shards=len(shards),
        shard_bytes=sum(shard.size for shard in shards),
        indexes=len(store.names),
        index_bytes=store.size,
        digest=store.index.digest(),
    )


def compact(directory: paths.PathLike, *, bytes_per_shard: int = SHARD_BYTES) -> tuple[StoreInfo, StoreInfo]:
    """Rewrites small shards as few large ones, and all indexes as one.

    Writers and readers may run meanwhile. Replaced answers are dropped. Shards of at least half
    `bytes_per_shard` are kept unless a tenth of their records was replaced. Old files are removed once the
    new index is written: first the indexes, then the shards. A kill at any moment loses nothing; a later run
    removes the leftovers.

    Returns:
      The store before and after.

    Raises:
      UserError: no store, another compaction is running, a damaged record or index, or a full disk.
      UnavailableError: the disk or the network fails.
    """
    folder = files.existing_folder(directory)
    with _compaction_lock(folder) as is_held:
        before = files.load(folder)
        index = before.index
        info = _info(before)
        moving = _shards_to_rewrite(index, bytes_per_shard)
        if len(before.names) > 1 or moving:
            merged = _rewrite(folder, index, moving, bytes_per_shard)
            name = f"{files.MERGED_PREFIX}{files.run_name()}{files.INDEX_SUFFIX}"
            paths.write_bytes_durable(folder / name, merged.to_bytes())
            if not is_held():
                raise UnavailableError(
                    f"{folder}: another compaction has begun; nothing was removed, start again"
                )
            _remove(folder, sorted(before.names))
            _remove(folder, sorted({shard.name for shard in index.shards} - merged.used_shards()))
        after = files.load(folder)
        _remove_abandoned(folder, {shard.name for shard in after.index.shards})
        return info, _info(after)


def _shards_to_rewrite(index: Index, bytes_per_shard: int) -> set[int]:
    """Codes of the shards whose records move."""
    live = np.bincount(index.rows()["shard"], minlength=len(index.shards))
    moving = {
        code
        for code, shard in enumerate(index.shards)
        if shard.size < bytes_per_shard // 2 or live[code] < 0.9 * shard.records
    }
    if len(moving) == 1 and live[min(moving)] == index.shards[min(moving)].records:
        return set()  # the rewritten shard would be identical
    return moving


def _rewrite(folder: epath.Path, index: Index, shards: set[int], limit: int) -> Index:
    """Copies the live records of `shards` to new shards; returns the index of the store with them."""
    moves = np.isin(index.rows()["shard"], sorted(shards))
    moving, kept = index.rows()[moves], index.rows()[~moves]
    moving = moving[np.lexsort((moving["record"], moving["shard"]))]
    readers, run = ShardReaders(folder), files.run_name()
    written: list[Shard] = []
    done = 0

    def records() -> Iterator[bytes]:
        nonlocal done
        size = 0
        for row in moving[done:]:
            shard = index.shards[row["shard"]]
            data = files.read_record(readers, folder, shard.name, int(row["record"]), shard.records)
            done, size = done + 1, size + len(data)
            yield data
            if size >= limit:
                return

    while done < len(moving):
        first = done
        name = f"annotations-{run}-{len(written):05d}{files.SHARD_SUFFIX}"
        written.append(files.write_shard(folder, name, records()))
        moving["shard"][first:done] = len(index.shards) + len(written) - 1
        moving["record"][first:done] = np.arange(done - first)
    return index.relocated(index_lib.concatenate([kept, moving]), written)


def _remove(folder: epath.Path, names: Sequence[str]) -> None:
    def unlink(name: str) -> None:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise paths.write_error(folder / name, error) from error

    with concurrent.futures.ThreadPoolExecutor(files.PARALLEL_FILES) as pool:
        list(pool.map(unlink, names))


def _remove_abandoned(folder: epath.Path, known: set[str]) -> None:
    """Removes the leftovers of killed processes: temporary files, and shards that are not `known`."""
    for path in paths.children(folder):
        partial = path.name.startswith((".annotations-", f".{files.MERGED_PREFIX}"))
        if partial or (path.name.endswith(files.SHARD_SUFFIX) and path.name not in known):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().mtime > _ABANDONED_SECONDS:
                    path.unlink()


@contextlib.contextmanager
def _compaction_lock(folder: epath.Path) -> Iterator[Callable[[], bool]]:
    """Excludes a second compaction; yields a function that tells whether the lock is still held.

    On a disk this is a file lock, which ends with the process. An object store has no locks: there, a small
    object serves as a lease, which another compaction takes over after an hour.
    """
    path = folder / _LEASE
    busy = UserError(f"{folder}: another compaction is running; wait for it, or delete {_LEASE} if none is")
    if "://" not in str(folder):
        try:
            file = open(path, "ab")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise paths.write_error(path, error) from error
        with file:
            if not locks.try_lock(file.fileno()):
                raise busy
            yield lambda: True
        return
    token = f"{time.time_ns()} {uuid.uuid4().hex}"

    def holder() -> str:
        return path.read_text() if path.exists() else ""

    held_since = holder().split(" ")[0]
    if held_since.isdecimal() and time.time() - int(held_since) / 1e9 < _LEASE_SECONDS:
        raise busy
    paths.write_text_atomic(path, token)
    if holder() != token:
        raise busy
    try:
        yield lambda: holder() == token
    finally:
        if holder() == token:
            path.unlink(missing_ok=True)
