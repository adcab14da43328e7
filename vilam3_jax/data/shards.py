"""Reads ArrayRecord shards from a local folder or an object store."""

from __future__ import annotations

import concurrent.futures
import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from vilam3_jax.data.caches import ByteLRU
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

_MAX_OPEN = 256  # each has an open file and an index of its records in memory


class ShardReaders:
    """The shards of one folder, opened on first use; thread-safe. The `_MAX_OPEN` most recent stay open.

    ArrayRecord reads only local files, so a shard of an object store is first copied to a temporary folder,
    once per process, without blocking reads of other shards. The copies are removed with this object.
    """

    def __init__(self, directory: paths.PathLike) -> None:
        """Opens no shard. `directory` is a local folder or a `gs://` prefix."""
        self._directory = paths.as_path(directory)
        self._remote = "://" in os.fspath(self._directory)
        self._readers: ByteLRU[ArrayRecordReader] = ByteLRU(_MAX_OPEN, lambda reader: 1)
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._fetched: dict[str, str] = {}  # name -> local copy that could be opened
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReaders, (self._directory,)  # worker processes open their own files

    def read(self, name: str, record: int, records: int | None = None) -> bytes:
        """Returns record number `record` of shard `name`, which must have `records` records unless None.

        Raises:
          UnavailableError: the shard is missing, damaged as a whole, or cannot be fetched.
          ValueError, IndexError, RuntimeError: the record is damaged or missing.
        """
        reader = self._readers.get(name, lambda: self._open(name, records))
        try:
            return self._record(reader, record)
        except RuntimeError:
            # A damaged record or a stale file handle; local copies cannot be stale.
            if self._remote:
                raise
        self._readers.discard(name, reader)  # unless another thread has reopened it
        return self._record(self._readers.get(name, lambda: self._open(name, records)), record)

    def _record(self, reader: ArrayRecordReader, record: int) -> bytes:
        with self._lock:
            # A range, because for a list of records the reader first scans all groups of the shard.
            (data,) = reader.read(record, record + 1)
        return data

    def _open(self, name: str, records: int | None) -> ArrayRecordReader:
        path = self._directory / name
        try:
            local = self._fetched.get(name)
            if local is None:
                if not path.exists():
                    raise OSError("no such file")
                local = self._fetch(path) if self._remote else os.fspath(path)
            reader = open_reader(local)
            if records is not None and reader.num_records() != records:
                raise OSError(f"has {reader.num_records()} records, {records} were written")
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(
                f"{path}: cannot be read ({error}); check its disk or network and start again, or restore it"
            ) from error
        if self._remote:
            self._fetched[name] = local
        return reader  # closed once it is evicted and no thread uses it

    def _fetch(self, path: Any) -> str:
        with self._lock:
            self._copies = self._copies or tempfile.TemporaryDirectory(prefix="vilam3-shards-")
        local = os.path.join(self._copies.name, path.name)
        try:
            path.copy(local, overwrite=True)
        except OSError as error:
            raise OSError(f"not fetched into {self._copies.name}, see TMPDIR: {error}") from error
        return local


def check_sizes(directory: paths.PathLike, sizes: Mapping[str, int]) -> None:
    """Raises `UserError` unless every shard (file name -> bytes) exists and has the expected size."""

    def problem(item: tuple[str, int]) -> str:
        path = paths.as_path(directory) / item[0]
        try:
            found = paths.file_size(path)
        except OSError as error:
            return f"{path}: {error.strerror or 'no such file'}"
        return "" if found == item[1] else f"{path}: has {found} bytes, {item[1]} were written"

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        wrong = [found for found in pool.map(problem, sizes.items()) if found]
    if wrong:
        more = f" (and {len(wrong) - 1} more shards)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}; copy or prepare the dataset again")


def open_reader(path: str) -> ArrayRecordReader:
    """Opens a local shard for random access, without read-ahead."""
    return ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")
