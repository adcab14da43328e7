"""Reads and writes the examples of a dataset; `tfds_folder` describes the files."""

from __future__ import annotations

import bisect
import collections
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from vilam3_jax.data import example_features, tfds_folder
from vilam3_jax.data.examples import SCHEMA_VERSION, Example
from vilam3_jax.data.shards import ShardReaders, check_sizes
from vilam3_jax.data.tfds_folder import Identity, ShardFile, read_info
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

_COUNTED = ("modality", "plane", "licence", "dataset")


class Counts:
    """Counts of a split by format, modality, licence, question type, expert and number of images."""

    def __init__(self) -> None:
        self._counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def add(self, example: Example) -> None:
        """Counts an example."""
        meta = example.meta
        questions = sorted({str(question.get("type")) for question in meta.get("qa") or ()})
        values = {key: [str(meta[key])] for key in _COUNTED if meta.get(key) is not None}
        values |= {"format": [example.format], "images": [str(len(example.images))]}
        values["question_types"] = [str(kind) for kind in meta.get("question_types") or questions]
        values["experts"] = [request.expert for request in example.expert_requests]
        for key, found in values.items():
            if found:
                self._counts[key].update(found)

    def merge(self, plain: Mapping[str, Mapping[str, int]]) -> None:
        """Adds the `plain` counts of another split."""
        for key, values in plain.items():
            self._counts[key].update(values)

    def plain(self) -> dict[str, dict[str, int]]:
        """Returns the counts as sorted plain values."""
        return {key: dict(sorted(values.items())) for key, values in sorted(self._counts.items())}


class ExampleWriter:
    """Writes one split of a dataset. As a context manager, it commits nothing if an exception is raised.

    `dataset_info.json` is written last; readers ignore splits that it does not list.
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
          directory: folder of the dataset, local or `gs://`; created if needed.
          split: lower-case name such as 'train' or 'heldout'.
          name: name of the dataset; default: name of the folder.
          provenance: plain values: source, version, citation, split procedure. Merged across splits.
          data_root: base of image paths, relative to `directory`.
          bytes_per_shard: size at which a shard is closed.

        Raises:
          UserError: the split exists, its name is invalid, or the folder cannot be created.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
            raise UserError(f"split {split!r}: use lower-case letters, digits and '_'")
        self.directory, self.split = paths.as_path(directory), split
        self.name = name or self.directory.name
        self._provenance, self._data_root = dict(provenance or {}), data_root
        self._limit = bytes_per_shard
        self._ids: set[str] = set()
        self._counts = Counts()
        self._shards: list[dict[str, Any]] = []
        self._open: ShardFile | None = None
        self._exists = (self.directory / tfds_folder.INFO_NAME).exists()
        if self._exists and split in read_info(self.directory)["splits"]:
            raise UserError(f"{directory}: already has a split {split!r}; choose a new folder")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remote = "://" in os.fspath(self.directory)
            # Shard names contain the number of shards, so shards are renamed at the end.
            self._work = epath.Path(
                tempfile.mkdtemp(prefix=f".{split}.partial-", dir=None if remote else self.directory)
            )
        except OSError as error:
            raise UserError(f"{directory}: cannot be created ({error}); choose another folder") from error

    def write(self, example: Example) -> None:
        """Adds an example; raises `UserError` for an invalid one, a repeated id, or a full disk."""
        example.validate()
        if example.id in self._ids:
            raise UserError(f"example {example.id!r}: written twice; ids must be unique in a split")
        data = example_features.encode(example)
        if self._open is None:
            self._open = ShardFile(self._work / f"{len(self._shards):05d}")
        self._open.write(data)
        self._ids.add(example.id)
        self._counts.add(example)
        if self._open.bytes >= self._limit:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.commit())
            self._open = None

    def close(self) -> dict[str, Any]:
        """Verifies the number of records, writes the metadata, and returns the content of `metadata.json`.

        Raises `UserError` if there are no examples or not all can be read back.
        """
        try:
            if not self._ids:
                raise UserError(f"{self.directory}: no example for split {self.split!r}; check the source")
            self._close_shard()
            if sum(shard["records"] for shard in self._shards) != len(self._ids):
                raise UserError(
                    f"{self.directory}: fewer records than were written; check the disk and write again"
                )
            return self._publish()
        except OSError as error:
            raise paths.write_error(self.directory, error) from error
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _publish(self) -> dict[str, Any]:
        for number, shard in enumerate(self._shards):
            written = self._work / shard["file"]
            shard["file"] = tfds_folder.shard_name(self.name, self.split, number, len(self._shards))
            if "://" in os.fspath(self.directory):
                written.copy(self.directory / shard["file"], overwrite=True)
            else:
                written.replace(self.directory / shard["file"])
        identity = {"schema_version": SCHEMA_VERSION, "name": self.name, "data_root": self._data_root}
        empty: dict[str, Any] = {**identity, "licences": [], "provenance": {}, "splits": {}}
        info = read_info(self.directory) if self._exists else empty
        info["provenance"] |= self._provenance
        counts = self._counts.plain()
        info["licences"] = sorted({*info["licences"], *counts.get("licence", {})})
        info["splits"][self.split] = {"records": len(self._ids), "shards": self._shards, "counts": counts}
        described = self._work / "described"
        described.mkdir()
        tfds_folder.write_info(described, Identity(self.name), info)
        for name in (tfds_folder.FEATURES_NAME, tfds_folder.METADATA_NAME, tfds_folder.INFO_NAME):
            paths.write_bytes_atomic(self.directory / name, (described / name).read_bytes())
        return info

    def abort(self) -> None:
        """Discards the split."""
        if self._open is not None:
            self._open.discard()
            self._open = None
        shutil.rmtree(self._work, ignore_errors=True)

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


class ExampleSource:
    """Random access to the examples of one split; thread-safe.

    Attributes:
      info: content of `metadata.json`, see `tfds_folder.read_info`.
      data_root: base of image paths.
    """

    def __init__(self, directory: paths.PathLike, split: str) -> None:
        """Checks the shards of a split. `directory` is a dataset or contains versions; the newest is read.

        Raises `UserError` for no such dataset or split, or a missing or truncated shard.
        """
        self.directory = tfds_folder.resolve(directory)
        self.split = split
        self.info = read_info(self.directory)
        if split not in self.info["splits"]:
            known = ", ".join(sorted(self.info["splits"])) or "none"
            raise UserError(f"{directory}: no split {split!r}; it has {known}")
        root = self.info.get("data_root", ".")
        is_absolute = root.startswith(("/", "~")) or "://" in root
        self.data_root = paths.as_path(root if is_absolute else self.directory / root)
        self._shards = self.info["splits"][split]["shards"]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard["records"])
        check_sizes(self.directory, {shard["file"]: shard["bytes"] for shard in self._shards})
        self._readers = ShardReaders(self.directory)

    @property
    def name(self) -> str:
        """Name of the dataset and its variant, as in a mixture."""
        variant = self.info["provenance"].get("config")
        return f"{self.info['name']}/{variant}" if variant else str(self.info["name"])

    def digests(self) -> list[str]:
        """Returns the sha256 of every shard, which identify the records of a stream position."""
        return [shard.get("sha256", "") for shard in self._shards]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        """Returns example `index`.

        Raises:
          IndexError: `index` is outside the split.
          UnavailableError: the shard cannot be read or was truncated.
          UserError: the record is damaged or not an example.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.directory} {self.split}")
        number = bisect.bisect_right(self._starts, index) - 1
        shard, record = self._shards[number], index - self._starts[number]
        path = self.directory / shard["file"]
        try:
            data = self._readers.read(shard["file"], record, shard["records"])
        except (ValueError, IndexError, RuntimeError) as error:
            self._check_size(shard)
            raise UserError(
                f"{path}, record {record}: cannot be read ({error}); prepare the dataset again"
            ) from error
        try:
            return example_features.decode(data)
        except UserError as error:
            self._check_size(shard)
            raise UserError(f"{path}, record {record}: {error}") from error

    def _check_size(self, shard: Mapping[str, Any]) -> None:
        """Raises `UnavailableError` if the shard was truncated, which affects more than one record."""
        try:
            check_sizes(self.directory, {shard["file"]: shard["bytes"]})
        except UserError as error:
            raise UnavailableError(str(error)) from error

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def find(self, example_id: str) -> int:
        """Returns the index of the example with this id; raises `UserError` if there is none."""
        for index, example in enumerate(self):
            if example.id == example_id:
                return index
        raise UserError(f"{self.directory}: no example {example_id!r} in split {self.split}; check the id")
