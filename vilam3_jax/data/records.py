"""Reading and writing the examples of a dataset; see `tfds_folder` for its files."""

from __future__ import annotations

import bisect
import collections
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
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
    """Counts of a split by format, modality, licence, type of question, expert and number of images."""

    def __init__(self) -> None:
        """Starts at nothing."""
        self._counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def add(self, example: Example) -> None:
        """Counts an example."""
        self._counts["format"][example.format] += 1
        for key in _COUNTED:
            if example.meta.get(key) is not None:
                self._counts[key][str(example.meta[key])] += 1
        for kind in _question_types(example.meta):
            self._counts["question_types"][kind] += 1
        for request in example.expert_requests:
            self._counts["experts"][request.expert] += 1
        self._counts["images"][str(len(example.images))] += 1

    def merge(self, plain: Mapping[str, Mapping[str, int]]) -> None:
        """Adds what `plain` of another one returned."""
        for key, values in plain.items():
            self._counts[key].update(values)

    def plain(self) -> dict[str, dict[str, int]]:
        """The counts as sorted plain values."""
        return {key: dict(sorted(values.items())) for key, values in sorted(self._counts.items())}


def _question_types(meta: Mapping[str, Any]) -> Iterable[str]:
    """The types as stated, or else those of the questions."""
    if meta.get("question_types"):
        return [str(kind) for kind in meta["question_types"]]
    return sorted({str(question.get("type")) for question in meta.get("qa") or ()})


class ExampleWriter:
    """Writes one split of a dataset. Use as a context manager: leaving by an error commits nothing.

    Readers go by `dataset_info.json`, which is written last: a split that is not in there does not exist.
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
        self._counts = Counts()
        self._shards: list[dict[str, Any]] = []
        self._open: ShardFile | None = None
        self._exists = (self.directory / tfds_folder.INFO_NAME).exists()
        if self._exists and split in read_info(self.directory)["splits"]:
            raise UserError(f"{directory}: already has a split {split!r}; choose a new folder")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remote = "://" in os.fspath(self.directory)
            # The number of shards is part of their names, so they get them at the end.
            self._work = epath.Path(
                tempfile.mkdtemp(prefix=f".{split}.partial-", dir=None if remote else self.directory)
            )
        except OSError as error:
            raise UserError(f"{directory}: cannot be created ({error}); choose another folder") from error

    def write(self, example: Example) -> None:
        """Adds one example.

        Raises:
          UserError: the example breaks its contract, its id was written before, or the disk is full.
        """
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
        """Commits the split: counts what can be read back, then writes the files that describe it.

        Returns:
          The content of `metadata.json`.

        Raises:
          UserError: nothing was written, or what can be read back is not what was written.
        """
        try:
            if not self._ids:
                raise UserError(f"{self.directory}: no example for split {self.split!r}; check the source")
            self._close_shard()
            if sum(shard["records"] for shard in self._shards) != len(self._ids):
                raise UserError(
                    f"{self.directory}: fewer records than were written; check the disk, write again"
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
        info = read_info(self.directory) if self._exists else self._new_info()
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

    def _new_info(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "data_root": self._data_root,
            "licences": [],
            "provenance": {},
            "splits": {},
        }

    def abort(self) -> None:
        """Removes what was written; the split does not come to exist."""
        if self._open is not None:
            self._open.discard()
            self._open = None
        shutil.rmtree(self._work, ignore_errors=True)

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


class ExampleSource:
    """Random access to the examples of one split; safe among threads.

    Attributes:
      info: the dataset's `metadata.json`, see `tfds_folder.read_info`.
      data_root: the folder that image paths are relative to.
    """

    def __init__(self, directory: paths.PathLike, split: str) -> None:
        """Looks that all shards are there, as long as they were written; opens none.

        Args:
          directory: of a dataset, or of its versions, of which the newest is read.
          split: its name.

        Raises:
          UserError: no such dataset or split (lists the splits there are), or a shard is missing or cut off.
        """
        self.directory = tfds_folder.resolve(directory)
        self.split = split
        self.info = read_info(self.directory)
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

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files: worker processes open their own."""
        return {key: value for key, value in self.__dict__.items() if key != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers = ShardReaders(self.directory)

    @property
    def name(self) -> str:
        """The dataset's name, with its variant: as in a mixture."""
        variant = self.info["provenance"].get("config")
        return f"{self.info['name']}/{variant}" if variant else str(self.info["name"])

    def digests(self) -> list[str]:
        """sha256 of every shard: what a place in a stream of these records depends on."""
        return [shard.get("sha256", "") for shard in self._shards]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        """Returns example `index`.

        Raises:
          IndexError: outside the split.
          UnavailableError: the shard cannot be read, or is not as long as it was written.
          UserError: the record is damaged, or no example.
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
        """Tells a shard that was cut off since it was opened, which costs many records, from a bad record."""
        try:
            check_sizes(self.directory, {shard["file"]: shard["bytes"]})
        except UserError as error:
            raise UnavailableError(str(error)) from error

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
