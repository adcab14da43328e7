"""Reading ArrayRecord shards, of a local folder or of an object store."""

from __future__ import annotations

import concurrent.futures
import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

_MAX_OPEN = 256  # each is an open file, and memory for the positions of its records


class ShardReaders:
    """The shards of one folder, each opened when it is first read; safe among threads.

    ArrayRecord reads local files only, so a shard of an object store is fetched whole when it is first
    needed, once a process, into the folder for temporary files; meanwhile other threads go on reading other
    shards. The copies are removed with this object.

    The `_MAX_OPEN` shards that were used last stay open; copies stay until this object goes.
    """

    def __init__(self, directory: paths.PathLike) -> None:
        """Opens nothing yet.

        Args:
          directory: local folder or `gs://` prefix.
        """
        self._directory = paths.as_path(directory)
        self._remote = "://" in os.fspath(self._directory)
        self._readers: dict[str, ArrayRecordReader] = {}  # the last used one is the last
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._fetched_before: dict[str, str] = {}  # name to the copy, which could be opened
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}

    def read(self, name: str, record: int, records: int | None = None) -> bytes:
        """Returns one record.

        Args:
          name: of the shard's file.
          record: number of the record in the shard.
          records: how many the shard must have; not checked if None.

        Raises:
          UnavailableError: the shard is missing, damaged as a whole, or cannot be fetched.
          ValueError, IndexError, RuntimeError: this record is damaged, or not there.
        """
        reader = self._reader(name, records)
        try:
            return self._record(reader, record)
        except RuntimeError:
            # The record is damaged, or a file server forgot the file; a copy is neither stale nor remote.
            if self._remote:
                raise
        with self._lock:  # unless another thread has opened it again
            if self._readers.get(name) is reader:
                del self._readers[name]
        return self._record(self._reader(name, records), record)

    def _record(self, reader: ArrayRecordReader, record: int) -> bytes:
        with self._lock:
            # As a range: for a list of records the reader walks through all of the shard's groups first.
            (data,) = reader.read(record, record + 1)
        return data

    def _reader(self, name: str, records: int | None) -> ArrayRecordReader:
        with self._lock:
            reader = self._readers.pop(name, None)
            if reader is not None:
                self._readers[name] = reader
            opening = self._opening.setdefault(name, threading.Lock())
        if reader is not None:
            return reader
        with opening:
            return self._readers.get(name) or self._open(name, records)

    def _open(self, name: str, records: int | None) -> ArrayRecordReader:
        path = self._directory / name
        try:
            local = self._fetched_before.get(name)
            if local is None:
                if not path.exists():
                    raise OSError("no such file")
                local = self._fetched(path) if self._remote else os.fspath(path)
            reader = open_reader(local)
            if records is not None and reader.num_records() != records:
                raise OSError(f"has {reader.num_records()} records, {records} were written")
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(
                f"{path}: cannot be read ({error}); check its disk or network and start again, or restore it"
            ) from error
        with self._lock:
            self._readers[name] = reader
            if self._remote:
                self._fetched_before[name] = local
            if len(self._readers) > _MAX_OPEN:
                del self._readers[next(iter(self._readers))]  # closed when no thread reads it any more
        return reader

    def _fetched(self, path: Any) -> str:
        with self._lock:
            self._copies = self._copies or tempfile.TemporaryDirectory(prefix="vilam3-shards-")
        local = os.path.join(self._copies.name, path.name)
        try:
            path.copy(local, overwrite=True)
        except OSError as error:
            raise OSError(f"not fetched into {self._copies.name}, see TMPDIR: {error}") from error
        return local


def check_sizes(directory: paths.PathLike, sizes: Mapping[str, int]) -> None:
    """Looks up every shard, 32 at a time.

    Args:
      directory: local folder or `gs://` prefix.
      sizes: name of a shard's file → bytes.

    Raises:
      UserError: shards are missing or of another size; names the first of them.
    """

    def look(item: tuple[str, int]) -> str:
        path = paths.as_path(directory) / item[0]
        try:
            found = paths.file_size(path)
        except OSError as error:
            return f"{path}: {error.strerror or 'no such file'}"
        return "" if found == item[1] else f"{path}: has {found} bytes, {item[1]} were written"

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        wrong = [problem for problem in pool.map(look, sizes.items()) if problem]
    if wrong:
        more = f" (and {len(wrong) - 1} more shards)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}; copy the dataset anew or prepare it again")


def open_reader(path: str) -> ArrayRecordReader:
    """Opens a local shard for reading single records: nothing is read ahead."""
    return ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")
