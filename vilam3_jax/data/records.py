"""Datasets on disk: ArrayRecord shards of examples and one `dataset.json` that says what is in them."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from vilam3_jax import paths
from vilam3_jax.data.examples import SCHEMA_VERSION, Example
from vilam3_jax.data.shards import ShardReaders, check_sizes, open_reader
from vilam3_jax.errors import UserError

INFO_NAME = "dataset.json"
_MAX_INFO_BYTES = 16 << 20
_FEATURES = {
    "id": "text, unique",
    "format": "pair | caption | document | conversation | study",
    "images": "bytes, or a path below the data root; for volumes axis, index, window",
    "turns": "role, text with <image> markers, supervised",
    "expert_requests": "expert, args, image, before_turn, policy",
    "meta": "dataset, split, modality, plane, patient, licence, question_types, label_source, input_key",
}


class ExampleWriter:
    """Writes one split of a dataset. Use as a context manager: leaving by an error commits nothing.

    Readers go by `dataset.json`, which is written last: a split that is not in there does not exist.
    """

    def __init__(
        self,
        directory: paths.PathLike,
        split: str,
        *,
        name: str = "",
        provenance: Mapping[str, Any] | None = None,
        data_root: str = ".",
        bytes_per_shard: int = 256 << 20,
    ) -> None:
        """Opens the split for writing.

        Args:
          directory: the dataset's folder, local or `gs://`; made if needed.
          split: lower-case name such as 'train' or 'heldout'.
          name: the dataset's name; the folder's if empty.
          provenance: plain values: source, version, citation, how it was split. Merged over splits.
          data_root: the folder that image paths are relative to; relative to `directory`.
          bytes_per_shard: a shard is closed when it holds this much.

        Raises:
          UserError: the split is there already, its name is no name, or the folder cannot be made.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
            raise UserError(f"split {split!r}: use lower-case letters, digits and '_'")
        self.directory = paths.as_path(directory)
        self.split = split
        self.name = name or self.directory.name
        self._provenance = dict(provenance or {})
        self._data_root = data_root
        self._limit = bytes_per_shard
        self._ids: set[str] = set()
        self._counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._shards: list[dict[str, Any]] = []
        self._open: _ShardFile | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be created ({error}); choose another folder") from error
        if (self.directory / INFO_NAME).exists() and split in read_info(self.directory)["splits"]:
            raise UserError(f"{directory}: already has a split {split!r}; choose a new folder")

    def write(self, example: Example) -> None:
        """Adds one example.

        Raises:
          UserError: the example breaks its contract, its id was written before, or the disk is full.
        """
        example.validate()
        if example.id in self._ids:
            raise UserError(f"example {example.id!r}: written twice; ids must be unique in a split")
        data = example.to_bytes()
        if self._open is None:
            self._open = _ShardFile(self.directory, f"{self.split}-{len(self._shards):05d}.array_record")
        self._open.write(data)
        self._ids.add(example.id)
        self._count(example)
        if self._open.bytes >= self._limit:
            self._close_shard()

    def _count(self, example: Example) -> None:
        self._counts["format"][example.format] += 1
        for key in ("modality", "plane", "licence", "dataset"):
            if example.meta.get(key) is not None:
                self._counts[key][str(example.meta[key])] += 1
        for kind in example.meta.get("question_types") or []:
            self._counts["question_types"][str(kind)] += 1
        for request in example.expert_requests:
            self._counts["experts"][request.expert] += 1
        self._counts["images"][str(len(example.images))] += 1

    def _close_shard(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.commit())
            self._open = None

    def close(self) -> dict[str, Any]:
        """Commits the split: counts what can be read back, then writes `dataset.json`.

        Returns:
          The content of `dataset.json`.

        Raises:
          UserError: nothing was written, or what can be read back is not what was written.
        """
        if not self._ids:
            raise UserError(f"{self.directory}: no example for split {self.split!r}; check the source")
        self._close_shard()
        if sum(shard["records"] for shard in self._shards) != len(self._ids):
            raise UserError(f"{self.directory}: fewer records than were written; check the disk, write again")
        info: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "data_root": self._data_root,
            "features": _FEATURES,
            "licences": [],
            "provenance": {},
            "splits": {},
        }
        if (self.directory / INFO_NAME).exists():
            info = read_info(self.directory)
        info["provenance"] |= self._provenance
        info["licences"] = sorted({*info["licences"], *self._counts["licence"]})
        info["splits"][self.split] = {
            "records": len(self._ids),
            "shards": self._shards,
            "counts": {key: dict(sorted(values.items())) for key, values in sorted(self._counts.items())},
        }
        paths.write_text_atomic(self.directory / INFO_NAME, json.dumps(info, indent=1) + "\n")
        return info

    def abort(self) -> None:
        """Removes what was written; the split does not come to exist."""
        if self._open is not None:
            self._open.discard()
            self._open = None
        for shard in self._shards:
            (self.directory / shard["file"]).unlink(missing_ok=True)
        self._shards = []

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


class _ShardFile:
    """One shard under a temporary name, counted and hashed when it is committed."""

    def __init__(self, directory: Any, name: str) -> None:
        self._target = directory / name
        self._remote = "://" in os.fspath(directory)
        if self._remote:
            handle, self._temporary = tempfile.mkstemp(suffix=name)
            os.close(handle)
        else:
            self._temporary = os.fspath(directory / f".{name}.partial")
        self._writer = ArrayRecordWriter(self._temporary, "group_size:1")
        self.records = self.bytes = 0

    def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
        except (OSError, RuntimeError) as error:
            raise self._refused(error) from error
        self.records += 1
        self.bytes += len(data)

    def commit(self) -> dict[str, Any]:
        try:
            self._writer.close()
            found = open_reader(self._temporary).num_records()
            if found != self.records:
                raise OSError(f"{found} of {self.records} records can be read back")
            digest, size = _file_digest(self._temporary)
            if self._remote:
                paths.as_path(self._temporary).copy(self._target, overwrite=True)
            else:
                os.replace(self._temporary, self._target)
        except (OSError, RuntimeError, ValueError) as error:
            raise self._refused(error) from error
        finally:
            self._remove()
        return {"file": self._target.name, "records": self.records, "bytes": size, "sha256": digest}

    def discard(self) -> None:
        try:
            self._writer.close()
        except (OSError, RuntimeError) as error:
            raise self._refused(error) from error
        finally:
            self._remove()

    def _remove(self) -> None:
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)

    def _refused(self, error: Exception) -> UserError:
        return UserError(f"{self._target}: cannot be written ({error}); free space or choose another folder")


def _file_digest(path: str) -> tuple[str, int]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest(), file.tell()


def read_info(directory: paths.PathLike) -> dict[str, Any]:
    """Reads a dataset's `dataset.json`.

    Raises:
      UserError: there is none, it is damaged, or of another schema.
    """
    path = paths.as_path(directory) / INFO_NAME
    if not path.exists():
        raise UserError(f"{path}: no such file; make the dataset with `vilam3 prepare`")
    try:
        info = json.loads(paths.read_bytes(path, _MAX_INFO_BYTES))
        version = info["schema_version"]
        for split in info["splits"].values():
            for shard in split["shards"]:
                if os.path.basename(shard["file"]) != shard["file"]:
                    raise ValueError(f"shard name {shard['file']!r}")
                int(shard["records"]), int(shard["bytes"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); prepare the dataset again") from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema {version}, this version reads {SCHEMA_VERSION}; prepare the dataset again"
        )
    return info


class ExampleSource:
    """Random access to the examples of one split; safe among threads.

    Attributes:
      info: the dataset's `dataset.json`.
      data_root: the folder that image paths are relative to.
    """

    def __init__(self, directory: paths.PathLike, split: str) -> None:
        """Reads `dataset.json` and looks that all shards are there, as long as they were written; opens none.

        Raises:
          UserError: no such dataset or split (lists the splits there are), or a shard is missing or cut off.
        """
        self.directory = paths.as_path(directory)
        self.split = split
        self.info = read_info(directory)
        if split not in self.info["splits"]:
            known = ", ".join(sorted(self.info["splits"])) or "none"
            raise UserError(f"{directory}: no split {split!r}; it has {known}")
        root = self.info.get("data_root", ".")
        self.data_root = paths.as_path(root if _is_absolute(root) else self.directory / root)
        self._shards = self.info["splits"][split]["shards"]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard["records"])
        check_sizes(self.directory, {shard["file"]: shard["bytes"] for shard in self._shards})
        self._readers = ShardReaders(self.directory)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self.info["name"])

    def digests(self) -> list[str]:
        """sha256 of every shard: what a place in a stream of these records depends on."""
        return [shard.get("sha256", "") for shard in self._shards]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        """Returns example `index`.

        Raises:
          IndexError: outside the split.
          UnavailableError: the shard cannot be read.
          UserError: the record is damaged, or no example.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.directory} {self.split}")
        number = next(i for i, start in enumerate(self._starts[1:]) if index < start)
        shard, record = self._shards[number], index - self._starts[number]
        path = self.directory / shard["file"]
        try:
            data = self._readers.read(shard["file"], record, shard["records"])
        except (ValueError, IndexError, RuntimeError) as error:
            raise UserError(
                f"{path}, record {record}: cannot be read ({error}); prepare the dataset again"
            ) from error
        try:
            return Example.from_bytes(data)
        except UserError as error:
            raise UserError(f"{path}, record {record}: {error}") from error

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def find(self, example_id: str) -> int:
        """Returns the index of the example with this id.

        Raises:
          UserError: there is none.
        """
        for index, example in enumerate(self):
            if example.id == example_id:
                return index
        raise UserError(f"{self.directory}: no example {example_id!r} in split {self.split}; check the id")


def _is_absolute(root: str) -> bool:
    return root.startswith(("/", "~")) or "://" in root
