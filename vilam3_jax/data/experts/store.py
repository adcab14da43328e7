"""The store of what experts said, as ArrayRecord shards with an index each.

The record is in `annotation_record`, records wrong on purpose are in `falsify`; both are offered here too.
This module imports neither jax nor flax nor torch: the expert processes write it, the training hosts read it.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from vilam3_jax import paths
from vilam3_jax.data.content_keys import DECODER_VERSION
from vilam3_jax.data.experts.falsify import falsify
from vilam3_jax.data.experts.record import (
    MAX_RECORD_BYTES,
    SCHEMA_VERSION,
    Annotation,
    Key,
    LabelMap,
    Segment,
    failed,
    segments_on_slice,
)
from vilam3_jax.data.shards import ShardReaders
from vilam3_jax.errors import UserError

__all__ = [
    "SCHEMA_VERSION",
    "Annotation",
    "AnnotationStore",
    "AnnotationWriter",
    "Key",
    "LabelMap",
    "Segment",
    "failed",
    "falsify",
    "segments_on_slice",
]

_INDEX_SUFFIX = ".index.json"
_INDEXES_AT_ONCE = 32  # an object store answers each after a while
_SHARD_SUFFIX = ".array_record"


class AnnotationWriter:
    """Adds annotations to a folder; may be killed at any moment and started again.

    Every run writes its own shards: records go to a hidden temporary file, which is renamed when the shard is
    full, and only then its index is written. A shard without index does not exist for readers, so nothing
    half-written is ever seen, and several writers may share a folder.
    """

    def __init__(
        self,
        directory: paths.PathLike,
        *,
        records_per_shard: int = 256,
        seconds_per_shard: float = 30.0,
        bytes_per_shard: int = 256 << 20,
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
        self._present = {key: entry["status"] for key, entry in _read_indexes(self.directory).items()}
        self._limits = (records_per_shard, seconds_per_shard, bytes_per_shard)
        self._run = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._shards = 0
        self._pending: list[tuple[Annotation, bytes]] = []
        self._bytes = 0
        self._started = time.monotonic()

    def has(self, input_key: str, expert: str, args: str = "") -> bool:
        """Whether the key is already stored (as a success or as a failure)."""
        return (input_key, expert, args) in self._present

    def status(self, input_key: str, expert: str, args: str = "") -> str | None:
        """'ok', 'failed', or None when the key is not stored."""
        return self._present.get((input_key, expert, args))

    def write(self, annotation: Annotation) -> bool:
        """Adds one record.

        A key already stored is skipped, except that a success replaces a failure.

        Returns:
          Whether it was added.
        """
        present = self._present.get(annotation.key)
        if present == "ok" or (present == "failed" and annotation.status == "failed"):
            return False
        if not self._pending:
            self._started = time.monotonic()
        data = annotation.to_bytes()
        self._pending.append((annotation, data))
        self._bytes += len(data)
        self._present[annotation.key] = annotation.status
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
        entries = [
            {
                "input_key": a.input_key,
                "expert": a.expert,
                "args": a.args,
                "record": i,
                "status": a.status,
                "version": a.version,
            }
            for i, (a, _) in enumerate(self._pending)
        ]
        index = {
            "schema_version": SCHEMA_VERSION,
            "decoder_version": DECODER_VERSION,
            "shard": name + _SHARD_SUFFIX,
            "entries": entries,
        }
        _write_shard(self.directory, name + _SHARD_SUFFIX, [data for _, data in self._pending])
        paths.write_text_atomic(self.directory / (name + _INDEX_SUFFIX), json.dumps(index, indent=1) + "\n")
        self._shards += 1
        self._pending, self._bytes = [], 0

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


class AnnotationStore:
    """Random access to the annotations of a folder, whatever number of runs wrote it."""

    def __init__(self, directory: paths.PathLike) -> None:
        """Reads the indexes; opens no shard yet.

        Raises:
          UserError: no such folder, or a damaged index.
        """
        self.directory = paths.as_path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such annotation store; run `vilam3-experts annotate` first")
        self._entries = _read_indexes(self.directory)
        self._readers = ShardReaders(self.directory)

    @classmethod
    def open(cls, directory: paths.PathLike) -> AnnotationStore:
        """Same as the constructor."""
        return cls(directory)

    def __getstate__(self) -> dict[str, Any]:
        # Open shards belong to one process.
        return {"directory": os.fspath(self.directory), "_entries": self._entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.directory = paths.as_path(state["directory"])
        self._entries = state["_entries"]
        self._readers = ShardReaders(self.directory)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def keys(self) -> Iterator[Key]:
        """Yields every key, in sorted order."""
        return iter(sorted(self._entries))

    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None:
        """Returns the annotation, or None when there is none.

        Raises:
          UnavailableError: the shard cannot be read.
          UserError: the annotation is damaged.
        """
        entry = self._entries.get((input_key, expert, args))
        if entry is None:
            return None
        shard = entry["shard"]
        try:
            data = self._readers.read(shard, entry["record"])
        except (ValueError, IndexError, RuntimeError) as error:
            raise UserError(
                f"{self.directory / shard}, record {entry['record']}: cannot be read ({error}); "
                "delete it with its index and annotate again"
            ) from error
        annotation = Annotation.from_bytes(data)
        if annotation.key != (input_key, expert, args):
            raise UserError(f"{self.directory / shard}: record {entry['record']} is not what its index says")
        return annotation


def _write_shard(directory: Any, name: str, records: Sequence[bytes]) -> None:
    remote = "://" in os.fspath(directory)
    with tempfile.TemporaryDirectory(prefix="vilam3-shard-") as scratch:
        temporary = os.path.join(scratch, name) if remote else os.fspath(directory / f".{name}.partial")
        try:
            # One record a group: looking one up reads nothing else. Planes are compressed already.
            writer = ArrayRecordWriter(temporary, "group_size:1,uncompressed")
            for data in records:
                writer.write(data)
            writer.close()
            if remote:
                paths.as_path(temporary).copy(directory / name, overwrite=True)
            else:
                os.replace(temporary, directory / name)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{directory / name}: cannot be written ({error}); free space or choose another folder"
            ) from error
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def _read_indexes(directory: Any) -> dict[Key, dict[str, Any]]:
    """Merges every index of the folder: successes win over failures, later runs over earlier ones."""
    files = [p for p in paths.children(directory) if p.name.endswith(_INDEX_SUFFIX) and p.name[0] != "."]
    with concurrent.futures.ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
        texts = pool.map(lambda path: paths.read_bytes(path, MAX_RECORD_BYTES), files)
        return _merged(zip(files, texts, strict=True))


def _merged(indexes: Iterable[tuple[Any, bytes]]) -> dict[Key, dict[str, Any]]:
    merged: dict[Key, dict[str, Any]] = {}
    for path, text in indexes:
        try:
            index: Mapping[str, Any] = json.loads(text)
            if index["schema_version"] != SCHEMA_VERSION:
                raise UserError(
                    f"{path}: schema {index['schema_version']}, this version reads {SCHEMA_VERSION}; "
                    "annotate into a new folder"
                )
            if index["decoder_version"] != DECODER_VERSION:
                raise UserError(
                    f"{path}: annotations of images as decoder version {index['decoder_version']} read "
                    f"them, this is version {DECODER_VERSION}; annotate into a new folder"
                )
            shard = index["shard"]
            if os.path.basename(shard) != shard:
                raise ValueError(f"shard name {shard!r}")
            for e in index["entries"]:
                key = (str(e["input_key"]), str(e["expert"]), str(e["args"]))
                if key in merged and merged[key]["status"] == "ok" and e["status"] != "ok":
                    continue
                merged[key] = {
                    "shard": shard,
                    "record": int(e["record"]),
                    "status": str(e["status"]),
                }
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged index ({error}); delete it and annotate again") from error
    return merged
