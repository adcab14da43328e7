"""User-supplied data: shared options, and splits that are stated by records or drawn by hash."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from vilam3_jax.datasets.dataset import Context, Dataset
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

TRAIN, HELDOUT = "train", "heldout"
STATED = "train, validation, test or heldout"
_SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("heldout", "held-out", "held_out"), HELDOUT),
}


class UserDataset(Dataset):
    """Base class of datasets of user-supplied records.

    Attributes:
      field: what options refer to in a record, for help texts.
      metavar: the same, as a placeholder.
    """

    licence = "unverified"
    access = "credentialed"
    field: ClassVar[str]
    metavar: ClassVar[str]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--patient`, `--modality` and `--licence`."""
        parser.add_argument("--patient", metavar=cls.metavar, help=f"{cls.field} with the patient id")
        parser.add_argument("--modality", default="", help="modality of all images: CT, MR, CXR, ...")
        parser.add_argument("--licence", default="", help="SPDX id or name of the licence of these data")

    def context(self, source: SourceFolder, split: str, **settings: Any) -> Context:
        """Sets `--licence`; see `Dataset.context`."""
        given = super().context(source, split, **settings)
        return dataclasses.replace(given, licence=self.options.licence or given.licence)


class UserFile(UserDataset):
    """A file of records with image paths, split by a field or by a hash of patient or images."""

    source_is_file: ClassVar[bool] = True

    def __init__(self, options: argparse.Namespace | None = None, config: str = "") -> None:
        """Raises `UserError` if `--heldout` is out of range."""
        super().__init__(options, config)
        if not 0 <= self.options.heldout < 1:
            raise UserError(f"--heldout {self.options.heldout}: give a share of at least 0 and below 1")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares the image folder and the options of splits."""
        super().add_arguments(parser)
        parser.add_argument("--images", metavar="DIR", help="folder of the images (default: of --source)")
        parser.add_argument(
            "--split-by",
            choices=("patient", "hash"),
            default="hash",
            help="what stays in one split: records of a patient or image, or of an image (default: hash)",
        )
        parser.add_argument(
            "--heldout", type=float, default=0.1, metavar="SHARE", help="held-out share (default: 0.1)"
        )
        parser.add_argument(
            "--split", metavar=cls.metavar, help=f"{cls.field} with the split; replaces --heldout"
        )

    def context(self, source: SourceFolder, split: str, **settings: Any) -> Context:
        """Sets `--images` as the root; see `Dataset.context`."""
        given = super().context(source, split, **settings)
        images = self.options.images
        return dataclasses.replace(given, root=str(paths.as_path(images))) if images else given

    def source_file(self, source: SourceFolder) -> str:
        """Returns the name of the source file.

        Raises:
          UserError: `--source` is a folder, or `--images` is not a folder.
        """
        file, images = getattr(self.options, "source_file", None), self.options.images
        if not file:
            raise UserError(f"{source.root}: --source must name a file. {self.instructions}")
        if images and not paths.as_path(images).is_dir():
            raise UserError(f"--images {images}: no such folder; give the folder that image paths start in")
        return file


def read_json(path: str, limit: int = 64 << 20) -> Any:
    """Reads a JSON file of up to `limit` bytes that an option names.

    Raises:
      UserError: it is not JSON, too large or unreadable.
    """
    try:
        return json.loads(paths.read_bytes(paths.as_path(path), limit))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())[:100]}); correct it") from error


def split_named(value: object) -> str | None:
    """Returns the split that a record states, or None.

    >>> split_named(" Val "), split_named("fold 3")
    ('validation', None)
    """
    return _SPLITS.get(value.strip().lower()) if isinstance(value, str) else None


def image_node(path: str) -> bytes:
    """Returns the node of an image path, for `groups_of`."""
    return b"image\0" + os.path.normpath(path.strip().replace("\\", "/")).encode("utf-8", "surrogatepass")


def groups_of(count: int, nodes: np.ndarray, lone: np.ndarray) -> np.ndarray:
    """Groups records that share anything, directly or through others.

    Args:
      count: number of records.
      nodes: (record, digest) pairs of shared things, such as patients and images. [m, 2] uint64.
      lone: group of a record without nodes. [count] uint64.

    Returns:
      [count] uint64: the smallest digest in the connected component.
    """
    names, place = np.unique(nodes[:, 1], return_inverse=True)
    owner = nodes[:, 0].astype(np.int64)
    ties = sparse.coo_array(
        (np.ones(len(owner), np.uint8), (owner, count + place)), shape=(count + len(names),) * 2
    )
    parts, part = csgraph.connected_components(ties, directed=False)
    least = np.full(parts, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, part[count:], names)
    alone = np.flatnonzero(np.bincount(owner, minlength=count) == 0)
    least[part[alone]] = lone[alone]
    return least[part[:count]]


def held_out(
    groups: np.ndarray, share: float, path: str, usable: np.ndarray | None = None
) -> Mapping[str, np.ndarray]:
    """Holds out groups whose hash lies below the share, at least one unless the share is 0.

    Args:
      groups: of `groups_of`.
      share: expected share of the groups.
      path: path of the file, for messages.
      usable: [n] bool, None for all; unusable records stay in train, where they are skipped.

    Returns:
      Split → [n] bool.

    Raises:
      UserError: all records are in one group.
    """
    usable = np.ones(len(groups), bool) if usable is None else usable
    mixed = _mixed(groups)
    held = usable & (mixed < np.uint64(share * 2**64))
    if share and usable.any() and not held.any():
        held = usable & (mixed == mixed[usable].min())
    if share and usable.any() and held[usable].all():
        raise UserError(
            f"{path}: all records share images or a patient, so none can be held out; give --heldout 0, or "
            "--split if the records state their split"
        )
    return {TRAIN: ~held, HELDOUT: held}


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hashes [n] uint64 to uniform values (SplitMix64 finalizer): minima of digests are not uniform."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
