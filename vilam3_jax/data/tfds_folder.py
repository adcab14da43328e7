"""Dataset folders: TFDS's `dataset_info.json` and `features.json`, our `metadata.json`, and shards.

`tfds.builder_from_directory` and `tfds.data_source` read such a folder without this package. `metadata.json`
contains what TFDS has no field for: sha256 of each shard, counts, licences, data root, provenance. It is
written before `dataset_info.json`, whose presence therefore marks a complete folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from vilam3_jax.data.examples import SCHEMA_VERSION
from vilam3_jax.data.shards import open_reader
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

INFO_NAME = "dataset_info.json"
METADATA_NAME = "metadata.json"
FEATURES_NAME = "features.json"
FILE_FORMAT = "array_record"
_OLD_INFO_NAME = "dataset.json"  # until November 2026
_MAX_INFO_BYTES = 64 << 20
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def is_dataset(folder: paths.PathLike) -> bool:
    """Whether `resolve` finds a dataset in `folder`."""
    with contextlib.suppress(UserError):
        resolve(folder)
        return True
    return False


def datasets_in(folder: paths.PathLike) -> list[epath.Path]:
    """Returns the dataset at `folder`, or all directly below it; raises `UserError` if there is none."""
    root = paths.as_path(folder)
    if is_dataset(root):
        return [root]
    found: list[epath.Path] = []
    for child in paths.children(root):
        found += [child] if is_dataset(child) else [variant for variant, _ in _variants(child)]
    if not found:
        raise UserError(
            f"{folder}: no dataset ({INFO_NAME}) in it or directly below it; run `vilam3 prepare`"
        )
    return found


def resolve(folder: paths.PathLike) -> epath.Path:
    """Returns `folder` or its newest version (`[CONFIG/]VERSION`); raises `UserError` unless unambiguous."""
    root = paths.as_path(folder)
    if (root / INFO_NAME).exists():
        return root
    if newest := _newest_version(root):
        return newest
    variants = _variants(root)
    if len(variants) == 1:
        return variants[0][1]
    if variants:
        names = ", ".join(f"{root.name}/{child.name}" for child, _ in variants)
        raise UserError(f"{folder}: has several variants; choose one of {names}")
    if (root / _OLD_INFO_NAME).exists():
        raise UserError(f"{folder}: written by an older version of this package; prepare the dataset again")
    raise UserError(f"{folder}: contains no dataset ({INFO_NAME}); create one with `vilam3 prepare`")


def _newest_version(folder: epath.Path) -> epath.Path | None:
    found = [
        (tuple(map(int, child.name.split("."))), child)
        for child in paths.children(folder)
        if _VERSION.fullmatch(child.name) and (child / INFO_NAME).exists()
    ]
    return max(found)[1] if found else None


def _variants(root: epath.Path) -> list[tuple[epath.Path, epath.Path]]:
    """Returns (folder, newest version) of the variants of a dataset, by name."""
    found = []
    for child in paths.children(root):
        if version := _newest_version(child):
            # The metadata names the dataset; a folder of datasets has the same layout as one of variants.
            info = _read_json(version / INFO_NAME)
            if info.get("name") == root.name and info.get("configName") == child.name:
                found.append((child, version))
    return found


def read_info(folder: paths.PathLike) -> dict[str, Any]:
    """Reads `metadata.json` of a dataset and checks it against `dataset_info.json`.

    Returns `name`, `schema_version`, `data_root`, `licences`, `provenance`, and `splits`: name -> `records`,
    `counts` and `shards` (each `file`, `records`, `bytes`, `sha256`). Raises `UserError` for no dataset, a
    damaged file, another schema version, or two files that disagree.
    """
    folder = resolve(folder)
    path = folder / METADATA_NAME
    info, tfds_info = _read_json(path), _read_json(folder / INFO_NAME)
    try:
        version = info["schema_version"]
        for split in info["splits"].values():
            for shard in split["shards"]:
                if os.path.basename(shard["file"]) != shard["file"]:
                    raise ValueError(f"shard name {shard['file']!r}")
                _ = int(shard["records"]), int(shard["bytes"])
        ours = {name: [s["records"] for s in split["shards"]] for name, split in info["splits"].items()}
        theirs = {split["name"]: [int(n) for n in split["shardLengths"]] for split in tfds_info["splits"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); prepare the dataset again") from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema {version}, this version reads {SCHEMA_VERSION}; prepare the dataset again"
        )
    if ours != theirs:
        raise UserError(f"{path}: does not agree with {INFO_NAME} beside it; prepare the dataset again")
    return info


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(paths.read_bytes(path, _MAX_INFO_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:100]}); prepare the dataset again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged (not an object); prepare the dataset again")
    return content


@dataclasses.dataclass(frozen=True)
class Identity:
    """Identity of a dataset in TFDS: lower-case name, version, variant ("" for none) and description."""

    name: str
    version: str = "1.0.0"
    config: str = ""
    description: str = ""


def tfds_name(name: str) -> str:
    """Converts `name` to a TFDS name: lower-case letters, digits and '_', starting with a letter."""
    name = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_") or "dataset"
    return name if name[0].isalpha() else f"dataset_{name}"


def shard_name(dataset: str, split: str, number: int, count: int) -> str:
    """Returns the file name of a shard by TFDS's template."""
    return f"{tfds_name(dataset)}-{split}.{FILE_FORMAT}-{number:05d}-of-{count:05d}"


def write_info(folder: epath.Path, identity: Identity, metadata: Mapping[str, Any]) -> None:
    """Writes `features.json`, `metadata` as returned by `read_info`, and finally `dataset_info.json`."""
    from tensorflow_datasets.core import Version, dataset_info

    from vilam3_jax.data.example_features import features_dict

    described = dataset_info.DatasetIdentity(
        name=tfds_name(identity.name),
        version=Version(identity.version),
        data_dir=os.fspath(folder),
        module_name="vilam3_jax",
        config_name=identity.config or None,
    )
    info = dataset_info.DatasetInfo(
        builder=described, description=identity.description or identity.name, features=features_dict()
    )
    info.set_file_format(FILE_FORMAT, override=True)
    info.set_splits(split_dict(folder, identity.name, metadata))
    features_dict().save_config(folder)
    paths.write_text_atomic(folder / METADATA_NAME, json.dumps(metadata, indent=1) + "\n")
    info.write_dataset_info_json(folder)


def split_dict(folder: epath.Path, name: str, metadata: Mapping[str, Any]) -> Any:
    """Returns TFDS's `SplitDict` for the splits of `metadata`."""
    from tensorflow_datasets.core import naming, splits

    template = naming.ShardedFileTemplate(
        data_dir=folder, dataset_name=tfds_name(name), filetype_suffix=FILE_FORMAT
    )
    return splits.SplitDict(
        [
            splits.SplitInfo(
                name=split,
                shard_lengths=[shard["records"] for shard in content["shards"]],
                num_bytes=sum(shard["bytes"] for shard in content["shards"]),
                filename_template=template,
            )
            for split, content in metadata["splits"].items()
        ]
    )


class ShardFile:
    """A local shard with a temporary name; verified, hashed and renamed on commit."""

    def __init__(self, target: paths.PathLike) -> None:
        """Opens a temporary file that `commit` renames to `target`."""
        self._target = os.fspath(target)
        folder, name = os.path.split(self._target)
        self._temporary = os.path.join(folder, f".{name}.partial")
        self._writer = ArrayRecordWriter(self._temporary, "group_size:1")
        self.records = self.bytes = 0

    def write(self, data: bytes) -> None:
        """Adds a record; raises `UserError` or `UnavailableError` if the disk is full or fails."""
        try:
            self._writer.write(data)
        except (OSError, RuntimeError) as error:
            raise paths.write_error(self._target, error) from error
        self.records += 1
        self.bytes += len(data)

    def commit(self) -> dict[str, Any]:
        """Verifies and renames the shard; returns `file`, `records`, `bytes` and `sha256`.

        Raises `UserError` or `UnavailableError` for a disk that is full or fails, or unreadable records.
        """
        try:
            self._writer.close()
            found = open_reader(self._temporary).num_records() if self.records else 0
            if found != self.records:
                raise OSError(f"{found} of {self.records} records can be read back")
            paths.sync(self._temporary)
            digest, size = file_digest(self._temporary)
            os.replace(self._temporary, self._target)
        except (OSError, RuntimeError, ValueError) as error:
            raise paths.write_error(self._target, error) from error
        finally:
            self._remove()
        name = os.path.basename(self._target)
        return {"file": name, "records": self.records, "bytes": size, "sha256": digest}

    def discard(self) -> None:
        """Removes the shard."""
        try:
            self._writer.close()
        except (OSError, RuntimeError) as error:
            raise paths.write_error(self._target, error) from error
        finally:
            self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)


def file_digest(path: paths.PathLike) -> tuple[str, int]:
    """Returns the sha256 (hex) and size in bytes of a local file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()
