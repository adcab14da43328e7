"""The annotation store: ArrayRecord shards, and an index (`index.py`) of their records.

The names of `record` and `falsify` are exported here too.
This module imports neither jax nor flax nor torch: the expert processes write it, the training hosts read it.

A store is a folder:

    annotations-RUN-NUMBER.array_record   records, one a group
    annotations-RUN-NUMBER.index          the sidecar of that shard, written after it
    merged-RUN.index                      the merged index that `compact` wrote

Readers ignore a shard that no index names. Every file appears whole and never changes. Only `compact` removes
files, namely those it replaced.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from vilam3_jax.data.content_keys import DECODER_VERSION
from vilam3_jax.data.experts import index as index_lib
from vilam3_jax.data.experts.falsify import falsify
from vilam3_jax.data.experts.index import Call, Entry, Found, Index, Shard, Versions
from vilam3_jax.data.experts.record import (
    SCHEMA_VERSION,
    Annotation,
    Key,
    LabelMap,
    Segment,
    failed,
    segments_on_slice,
)
from vilam3_jax.data.shards import ShardReaders
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

__all__ = [
    "SCHEMA_VERSION",
    "Annotation",
    "AnnotationStore",
    "AnnotationWriter",
    "Key",
    "LabelMap",
    "Segment",
    "StoreInfo",
    "compact",
    "content_sha256",
    "failed",
    "falsify",
    "new_store",
    "segments_on_slice",
    "store_info",
]

SHARD_BYTES = 256 << 20
_INDEX_SUFFIX = ".index"
_OLD_INDEX_SUFFIX = ".index.json"  # until schema 2
_MERGED_PREFIX = "merged-"
_SHARD_SUFFIX = ".array_record"
_LEASE = ".compacting"
_FILES_AT_ONCE = 32  # an object store answers each after a while
_READS = 10  # how often a folder is listed anew while others compact it
_LEASE_SECONDS = 3600.0
_ABANDONED_SECONDS = 24 * 3600.0  # what no index names after this time belongs to nobody


def content_sha256(annotation: Annotation) -> str:
    """sha256 (hex) of an expert's answer: of the record's bytes with `seconds` set to 0.

    Equal for equal answers, whichever process computed them and however long it took.
    """
    return hashlib.sha256(dataclasses.replace(annotation, seconds=0.0).to_bytes()).hexdigest()


class _Pending(NamedTuple):
    entry: Entry
    data: bytes


class AnnotationWriter:
    """Adds annotations to a folder; may be killed at any moment and started again.

    Every run writes its own shards: records go to a hidden temporary file, which is renamed when the shard is
    full, and only then its index is written. A shard without index does not exist for readers, so nothing
    half-written is ever seen, and several writers, on several hosts, may share a folder. Both files are on
    the disk (fsync) before `flush` returns.

    What other writers commit after this one was opened is not seen: two writers that are given the same work
    both do it, and the store keeps one of the answers.
    """

    def __init__(
        self,
        directory: paths.PathLike,
        *,
        records_per_shard: int = 256,
        seconds_per_shard: float = 30.0,
        bytes_per_shard: int = SHARD_BYTES,
    ) -> None:
        """Opens (or creates) the store and reads which keys it has.

        Args:
          directory: local or `gs://` folder.
          records_per_shard, seconds_per_shard, bytes_per_shard: a shard is committed when one of them is
            reached, so a kill loses at most that much work.

        Raises:
          UserError: the folder cannot be made or an index in it is damaged.
        """
        self.directory = paths.as_path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be created ({error}); choose another folder") from error
        self._index = _read_index(self.directory, _index_names(self.directory))
        self._limits = (records_per_shard, seconds_per_shard, bytes_per_shard)
        self._run = _run_name()
        self._shards = 0
        # Later than all that is there, even if this host's clock is behind the others'.
        self._stamp = self._index.latest()
        self._pending: list[_Pending] = []
        self._pending_status: dict[Key, str] = {}
        self._bytes = 0
        self._started = time.monotonic()

    def has(self, input_key: str, expert: str, args: str = "") -> bool:
        """Whether the key is already stored (as a success or as a failure)."""
        return self.status(input_key, expert, args) is not None

    def status(self, input_key: str, expert: str, args: str = "") -> str | None:
        """'ok', 'failed', or None when the key is not stored."""
        key = (input_key, expert, args)
        if key in self._pending_status:
            return self._pending_status[key]
        found = self._index.find(key)
        return None if found is None else found.call.status

    def write(self, annotation: Annotation) -> bool:
        """Adds one record.

        A key already stored is skipped, except that a success replaces a failure.

        Returns:
          Whether it was added.

        Raises:
          UserError: the shard is full and cannot be written; what is pending stays pending.
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
        self._pending.append(_Pending(entry, data))
        self._pending_status[annotation.key] = annotation.status
        self._bytes += len(data)
        records, seconds, size = self._limits
        elapsed = time.monotonic() - self._started
        if len(self._pending) >= records or self._bytes >= size or elapsed >= seconds:
            self.flush()
        return True

    def flush(self) -> None:
        """Commits what is pending: shard, rename, index.

        Raises:
          UserError: the folder cannot be written; what is pending stays pending.
        """
        if not self._pending:
            return
        name = f"annotations-{self._run}-{self._shards:05d}"
        shard = _write_shard(self.directory, name + _SHARD_SUFFIX, (p.data for p in self._pending))
        entries = [p.entry for p in self._pending]
        own = Index()
        own.add_shard(shard, entries)
        paths.write_bytes_durable(self.directory / (name + _INDEX_SUFFIX), own.to_bytes(_versions()))
        self._index.add_shard(shard, entries)
        self._index.balance()
        self._shards += 1
        self._pending, self._pending_status, self._bytes = [], {}, 0

    def close(self) -> None:
        """Commits what is pending."""
        self.flush()

    def __enter__(self) -> AnnotationWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also after an error: every pending record is complete by itself.
        self.flush()


def new_store(directory: paths.PathLike) -> AnnotationWriter:
    """Opens a folder that holds no record yet, for a changed copy of another store.

    Raises:
      UserError: it holds records; or as `AnnotationWriter`.
    """
    writer = AnnotationWriter(directory)
    if len(writer._index):
        raise UserError(f"{directory}: holds records, which never change; give a new folder as --out")
    return writer


class AnnotationStore:
    """Random access to the annotations of a folder, written by any number of runs.

    A store shows what was committed when it was opened, also while the folder is compacted: a record whose
    shard is gone is looked up again. It is pickled as the names of its index files.
    """

    def __init__(self, directory: paths.PathLike) -> None:
        """Reads the indexes; opens no shard yet.

        Raises:
          UserError: no such folder, or a damaged index.
          UnavailableError: the disk or the network fails.
        """
        self.directory = paths.as_path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such annotation store; run `vilam3-experts annotate` first")
        self._names = _index_names(self.directory)
        self._index = _read_index(self.directory, self._names)
        self._open()

    def _open(self) -> None:
        self._places = self._index  # where the records lie; another one once the folder was compacted
        self._readers = ShardReaders(self.directory)
        self._digest: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": os.fspath(self.directory), "names": self._names.known, "digest": self.digest()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.directory = paths.as_path(state["directory"])
        self._names = _Names(self.directory, state["names"])
        self._index = _read_index(self.directory, self._names)
        self._open()
        if self._names.known != state["names"] and self.digest() != state["digest"]:
            raise UnavailableError(
                f"{self.directory}: was compacted and has other answers than when it was opened; start again"
            )

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and len(key) == 3 and self._index.find(key) is not None

    def keys(self) -> Iterator[Key]:
        """Yields every key; the order depends on nothing but the keys."""
        return self._index.keys()

    def digest(self, expert: str | None = None) -> str:
        """sha256 (hex) of all answers, see `Index.digest`; of one expert alone if it is named."""
        if expert is not None:
            return self._index.digest(expert)
        if self._digest is None:
            self._digest = self._index.digest()
        return self._digest

    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None:
        """Returns the annotation, or None when there is none.

        Raises:
          UnavailableError: the shard cannot be read.
          UserError: the annotation is damaged.
        """
        key = (input_key, expert, args)
        found = self._index.find(key)
        if found is None:
            return None
        place = found if self._places is self._index else self._moved(key, found)
        try:
            data = self._read(place)
        except UnavailableError:
            if paths.exists(self.directory / place.shard):
                raise
            self._places = _read_index(self.directory, _index_names(self.directory))
            place = self._moved(key, found)
            data = self._read(place)
        annotation = Annotation.from_bytes(data)
        if annotation.key != key:
            raise UserError(
                f"{self.directory / place.shard}: record {place.record} is not what its index says; "
                "delete both and annotate again"
            )
        return annotation

    def _moved(self, key: Key, known: Found) -> Found:
        found = self._places.find(key)
        if found is None or found.stamp != known.stamp:
            raise UnavailableError(
                f"{self.directory}: the answer of {key[1]} on {key[0][:12]} was replaced since this store "
                "was opened; start again"
            )
        return found

    def _read(self, place: Found) -> bytes:
        try:
            return self._readers.read(place.shard, place.record)
        except (ValueError, IndexError, RuntimeError) as error:
            raise UserError(
                f"{self.directory / place.shard}, record {place.record}: cannot be read ({error}); "
                "delete it with its index and annotate again"
            ) from error


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """Size and content of a store.

    Attributes:
      records: keys that are answered.
      calls: number of records of each expert, argument, version and status.
      stored: records in the shards, those included that a later one replaced.
      shards: number of shards.
      shard_bytes: their size.
      indexes: number of index files.
      index_bytes: their size.
      digest: sha256 (hex) of the answers, see `Index.digest`.
    """

    records: int
    calls: dict[Call, int]
    stored: int
    shards: int
    shard_bytes: int
    indexes: int
    index_bytes: int
    digest: str


def store_info(directory: paths.PathLike) -> StoreInfo:
    """Reads the indexes of a store; opens no shard.

    Raises:
      UserError, UnavailableError: as `AnnotationStore`.
    """
    store = AnnotationStore(directory)
    return _info(store._index, store._names)


def _info(index: Index, names: _Names) -> StoreInfo:
    return StoreInfo(
        records=len(index),
        calls=dict(sorted(index.counts().items())),
        stored=sum(shard.records for shard in index.shards),
        shards=len(index.shards),
        shard_bytes=sum(shard.size for shard in index.shards),
        indexes=len(names.known),
        index_bytes=names.size,
        digest=index.digest(),
    )


def compact(directory: paths.PathLike, *, bytes_per_shard: int = SHARD_BYTES) -> tuple[StoreInfo, StoreInfo]:
    """Rewrites small shards as few large ones, and all indexes as one.

    Writers and readers may go on meanwhile. What a later answer replaced is dropped. Shards of at least half
    `bytes_per_shard` stay as they are unless a tenth of their records was replaced. Files are removed when
    the new index is there: first the indexes, then the shards. Killed at any moment it loses nothing; what it
    left behind is removed by a later run.

    Args:
      directory: local or `gs://` folder.
      bytes_per_shard: size of the new shards, bytes.

    Returns:
      The store before and after.

    Raises:
      UserError: no store, another compaction is running, a damaged record or index, or a full disk.
      UnavailableError: the disk or the network fails.
    """
    folder = paths.as_path(directory)
    if not folder.is_dir():
        raise UserError(f"{directory}: no such annotation store; run `vilam3-experts annotate` first")
    with _alone(folder) as still_alone:
        names = _index_names(folder)
        index = _read_index(folder, names)
        before = _info(index, names)
        rows = index.rows()
        gone = _worth_rewriting(index, rows, bytes_per_shard)
        if len(names.known) > 1 or gone:
            merged = _rewritten(folder, index, rows, gone, bytes_per_shard)
            name = f"{_MERGED_PREFIX}{_run_name()}{_INDEX_SUFFIX}"
            paths.write_bytes_durable(folder / name, merged.to_bytes(_versions()))
            if not still_alone():
                raise UnavailableError(
                    f"{folder}: another compaction has begun; nothing was removed, start again"
                )
            _remove(folder, sorted(names.known))
            _remove(folder, sorted({shard.name for shard in index.shards} - merged.used_shards()))
        _remove_abandoned(folder)
        names = _index_names(folder)
        return before, _info(_read_index(folder, names), names)


def _worth_rewriting(index: Index, rows: np.ndarray, bytes_per_shard: int) -> set[int]:
    """Codes of the shards whose records move."""
    live = np.bincount(rows["shard"], minlength=len(index.shards))
    gone = {
        code
        for code, shard in enumerate(index.shards)
        if shard.size < bytes_per_shard // 2 or live[code] < 0.9 * shard.records
    }
    if len(gone) == 1 and live[min(gone)] == index.shards[min(gone)].records:
        return set()  # it would become the same file
    return gone


def _rewritten(folder: epath.Path, index: Index, rows: np.ndarray, gone: set[int], limit: int) -> Index:
    """The index of the store with the records of the shards `gone` in new shards, which it writes."""
    moving = rows[np.isin(rows["shard"], sorted(gone))]
    moving = moving[np.lexsort((moving["record"], moving["shard"]))]
    readers = ShardReaders(folder)
    run = _run_name()
    moved: list[Shard] = []
    places: list[np.ndarray] = []
    done = 0
    while done < len(moving):
        count = 0

        def records(first: int = done) -> Iterator[bytes]:
            nonlocal count
            size = 0
            for row in moving[first:]:
                shard, record = index.shards[row["shard"]], int(row["record"])
                try:
                    data = readers.read(shard.name, record, shard.records)
                except (ValueError, IndexError, RuntimeError) as error:
                    raise UserError(
                        f"{folder / shard.name}, record {record}: cannot be read ({error}); "
                        "delete it with its index and annotate again"
                    ) from error
                count, size = count + 1, size + len(data)
                yield data
                if size >= limit:
                    return

        name = f"annotations-{run}-{len(moved):05d}{_SHARD_SUFFIX}"
        shard = _write_shard(folder, name, records())
        moved.append(shard)
        part = moving[done : done + count].copy()
        part["shard"] = len(index.shards) + len(moved) - 1
        part["record"] = np.arange(count)
        places.append(part)
        done += count
    kept = rows[~np.isin(rows["shard"], sorted(gone))]
    return index.relocated(index_lib.joined([kept, *places]), moved)


def _remove(folder: epath.Path, names: Sequence[str]) -> None:
    def unlink(name: str) -> None:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise paths.write_error(folder / name, error) from error

    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(unlink, names))


def _remove_abandoned(folder: epath.Path) -> None:
    """Removes what killed processes left: shards that no index names, and temporary files."""
    known = {shard.name for shard in _read_index(folder, _index_names(folder)).shards}
    for path in paths.children(folder):
        partial = path.name.startswith(".annotations-") or path.name.startswith(f".{_MERGED_PREFIX}")
        if partial or (path.name.endswith(_SHARD_SUFFIX) and path.name not in known):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().mtime > _ABANDONED_SECONDS:
                    path.unlink()


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[Any]:
    """Keeps a second compaction away; yields a function that tells whether this one is still alone.

    On a disk that is a lock, which ends with the process. An object store has none: a small object stands for
    it, and one that is older than an hour is taken over.
    """
    path = folder / _LEASE
    busy = UserError(f"{folder}: another compaction is running; wait for it, or delete {_LEASE} if none is")
    if "://" not in str(folder):
        try:
            file = open(path, "ab")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise paths.write_error(path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy from None
            yield lambda: True
        return
    token = f"{time.time_ns()} {uuid.uuid4().hex}"

    def holder() -> str:
        return path.read_text() if path.exists() else ""

    held = holder().split(" ")[0]
    if held.isdecimal() and time.time() - int(held) / 1e9 < _LEASE_SECONDS:
        raise busy
    paths.write_text_atomic(path, token)
    if holder() != token:
        raise busy
    try:
        yield lambda: holder() == token
    finally:
        if holder() == token:
            path.unlink(missing_ok=True)


def _run_name() -> str:
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def _versions() -> Versions:
    return Versions(SCHEMA_VERSION, DECODER_VERSION)


def _write_shard(directory: epath.Path, name: str, records: Iterator[bytes]) -> Shard:
    """Writes a shard whole: on a disk beside its place and renamed, for an object store in a scratch folder.

    Raises:
      UserError: the disk is full or the folder cannot be written; whatever `records` raises.
    """
    remote = "://" in os.fspath(directory)
    with tempfile.TemporaryDirectory(prefix="vilam3-shard-") as scratch:
        temporary = os.path.join(scratch, name) if remote else os.fspath(directory / f".{name}.partial")
        try:
            # One record a group: looking one up reads nothing else. Planes are compressed already.
            writer = ArrayRecordWriter(temporary, "group_size:1,uncompressed")
            count = 0
            for data in records:
                writer.write(data)
                count += 1
            writer.close()
            size = os.path.getsize(temporary)
            if remote:
                epath.Path(temporary).copy(directory / name, overwrite=True)
            else:
                paths.sync(temporary)
                os.replace(temporary, directory / name)
                paths.sync(directory)  # before the index that names it
            return Shard(name, count, size)
        except (OSError, RuntimeError) as error:
            raise paths.write_error(directory / name, error) from error
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


@dataclasses.dataclass
class _Names:
    """The index files of a folder, as they were when it was listed.

    Attributes:
      folder: of the store.
      known: names.
      size: of all files together once they have been read, bytes.
    """

    folder: epath.Path
    known: frozenset[str]
    size: int = 0


def _index_names(folder: epath.Path) -> _Names:
    """Lists the index files until no listing lacks what the one before it had.

    A listing that overlaps a compaction may show neither the new index nor the old ones.
    """
    names: frozenset[str] | None = None
    for _ in range(_READS):
        again = frozenset(
            name
            for name in _listed(folder)
            if name.endswith((_INDEX_SUFFIX, _OLD_INDEX_SUFFIX)) and name[0] != "."
        )
        if names is not None and names <= again:
            return _Names(folder, again)
        names = again
    raise UnavailableError(
        f"{folder}: files come and go while it is listed; wait for compactions and start again"
    )


def _listed(folder: epath.Path) -> list[str]:
    """Names in a folder, nothing if there is none. Thousands of path objects would take a second."""
    if "://" in str(folder):
        return [path.name for path in paths.children(folder)]
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        paths.check_passing(folder, error)
        raise UserError(f"{folder}: cannot be listed ({error}); check the path") from error


def _read_index(folder: epath.Path, names: _Names) -> Index:
    """Reads the index files `names`, or those that replaced them: `names` then tells which.

    Raises:
      UserError: a damaged file, or one of another version.
      UnavailableError: the disk or the network fails.
    """
    for _ in range(_READS):
        for name in sorted(names.known):
            if name.endswith(_OLD_INDEX_SUFFIX):
                raise _old_store(folder / name)
        # The merged index comes first: it stays as it is, the others are added to it.
        ordered = sorted(names.known, key=lambda name: (not name.startswith(_MERGED_PREFIX), name))
        files = [f"{folder}/{name}" for name in ordered]
        try:
            with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
                contents = list(pool.map(index_lib.open_file, files))
        except FileNotFoundError:
            names.known = _index_names(folder).known
            continue
        names.size = sum(map(len, contents))
        return index_lib.read_index(zip(files, contents, strict=True), _versions())
    raise UnavailableError(
        f"{folder}: files come and go while it is read; wait for compactions and start again"
    )


def _old_store(path: epath.Path) -> UserError:
    try:
        found = json.loads(paths.read_bytes(path, SHARD_BYTES))["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        return UserError(f"{path}: damaged index ({error}); delete it and annotate again")
    return UserError(f"{path}: {index_lib.wrong_schema(found, SCHEMA_VERSION)}")
