"""The files of an annotation store: naming, listing, loading and writing them."""

from __future__ import annotations

import concurrent.futures
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from vilam3_jax.data.experts import index as index_lib
from vilam3_jax.data.experts.index import Index, Shard
from vilam3_jax.data.shards import ShardReaders
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

INDEX_SUFFIX = ".index"
MERGED_PREFIX = "merged-"
SHARD_SUFFIX = ".array_record"
PARALLEL_FILES = 32  # hides the latency of an object store
_OLD_INDEX_SUFFIX = ".index.json"  # until schema 2
_MAX_OLD_INDEX_BYTES = 256 << 20
_LIST_ATTEMPTS = 10  # listings of a folder that others are compacting


class LoadedIndex(NamedTuple):
    """The index of a folder, with the names and total size (bytes) of the files it was read from."""

    index: Index
    names: frozenset[str]
    size: int


def existing_folder(directory: paths.PathLike) -> epath.Path:
    folder = paths.as_path(directory)
    if not folder.is_dir():
        raise UserError(f"{directory}: no such annotation store; run `vilam3-experts annotate` first")
    return folder


def load(folder: epath.Path, names: frozenset[str] | None = None) -> LoadedIndex:
    """Reads the index files `names`, or all of the folder if one of them is gone or none are given.

    Raises `UserError` for a file that is damaged or of another version, or `UnavailableError`.
    """
    for _ in range(_LIST_ATTEMPTS):
        if names is None:
            names = _index_names(folder)
        for name in sorted(names):
            if name.endswith(_OLD_INDEX_SUFFIX):
                raise _old_schema(folder / name)
        # The merged index is the largest: as the first it stays mapped.
        ordered = sorted(names, key=lambda name: (not name.startswith(MERGED_PREFIX), name))
        files = [f"{folder}/{name}" for name in ordered]
        try:
            with concurrent.futures.ThreadPoolExecutor(PARALLEL_FILES) as pool:
                contents = list(pool.map(index_lib.open_file, files))
        except FileNotFoundError:
            names = None
            continue
        index = index_lib.read_index(zip(files, contents, strict=True))
        return LoadedIndex(index, names, sum(map(len, contents)))
    raise _unstable(folder, "read")


def _index_names(folder: epath.Path) -> frozenset[str]:
    """Lists the index files, until a listing includes all names of the one before.

    A listing during a compaction may lack both the new index and the old ones.
    """
    names: frozenset[str] | None = None
    for _ in range(_LIST_ATTEMPTS):
        suffixes = (INDEX_SUFFIX, _OLD_INDEX_SUFFIX)
        again = frozenset(name for name in _listed(folder) if name.endswith(suffixes) and name[0] != ".")
        if names is not None and names <= again:
            return again
        names = again
    raise _unstable(folder, "listed")


def _unstable(folder: epath.Path, action: str) -> UnavailableError:
    return UnavailableError(
        f"{folder}: files come and go while it is {action}; wait for compactions and start again"
    )


def _listed(folder: epath.Path) -> list[str]:
    """Names in a folder, none if it does not exist. Path objects would take a second for thousands."""
    if "://" in str(folder):
        return [path.name for path in paths.children(folder)]
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        paths.check_passing(folder, error)
        raise UserError(f"{folder}: cannot be listed ({error}); check the path") from error


def _old_schema(path: epath.Path) -> UserError:
    try:
        found = json.loads(paths.read_bytes(path, _MAX_OLD_INDEX_BYTES))["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        return UserError(f"{path}: damaged index ({error}); delete it and annotate again")
    return UserError(f"{path}: {index_lib.wrong_schema(found)}")


def run_name() -> str:
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def read_record(
    readers: ShardReaders, folder: epath.Path, shard: str, record: int, records: int | None = None
) -> bytes:
    try:
        return readers.read(shard, record, records)
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{folder / shard}, record {record}: cannot be read ({error}); "
            "delete it with its index and annotate again"
        ) from error


def write_shard(directory: epath.Path, name: str, records: Iterator[bytes]) -> Shard:
    """Writes a whole shard: renamed from a hidden file on a disk, copied to an object store.

    Raises `UserError` for a full or write-protected disk, and the errors of `records`.
    """
    remote = "://" in os.fspath(directory)
    with tempfile.TemporaryDirectory(prefix="vilam3-shard-") as scratch:
        temporary = os.path.join(scratch, name) if remote else os.fspath(directory / f".{name}.partial")
        try:
            # One record per group: a look-up reads nothing else. Label planes are compressed already.
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
