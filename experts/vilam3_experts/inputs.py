"""The scans an expert is run over: a samples folder, or any folder (or file) of images and volumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
from etils import epath

from vilam3_experts.descriptors import Descriptor
from vilam3_experts.weights import is_samples_folder
from vilam3_jax import paths
from vilam3_jax.data.images import load_film
from vilam3_jax.data.volumes import Volume, load_volume
from vilam3_jax.datasets.samples import read_samples
from vilam3_jax.errors import UserError

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Input:
    """One scan, not yet read.

    Attributes:
      name: unique among the inputs; a sample's name or the path below the data folder.
      path: file, or the folder of a DICOM series.
      kind: how it is read.
    """

    name: str
    path: epath.Path
    kind: Literal["volume", "image"]

    def load(self) -> Volume | np.ndarray:
        """Reads and decodes it.

        Raises:
          UserError: names the file and what is wrong with it.
        """
        return load_volume(self.path) if self.kind == "volume" else load_film(self.path)


def find_inputs(data: paths.PathLike, descriptor: Descriptor) -> list[Input]:
    """Lists what `descriptor` is meant for, in a fixed order.

    Of a samples folder: the samples of the expert's kind, region and modality. Of any other folder: every
    file of a type the expert reads, in all folders below; two DICOM files or more in one folder are one
    series for a volume expert.

    Raises:
      UserError: no such folder or file, or nothing in it for this expert.
    """
    root = paths.as_path(data)
    if not root.exists():
        raise UserError(f"{data}: no such file or folder; check --data")
    if root.is_dir() and is_samples_folder(root):
        found = list(_from_samples(root, descriptor))
    elif root.is_dir():
        found = list(_from_folder(root, root, descriptor.input))
    else:
        found = [Input(root.name, root, descriptor.input)]
    if not found:
        raise UserError(
            f"{data}: nothing in it that {descriptor.name} reads ({descriptor.input}); check --data"
        )
    return found


def _from_samples(root: epath.Path, descriptor: Descriptor) -> Iterator[Input]:
    wanted = {
        "kind": descriptor.sample_kind,
        "body_region": descriptor.body_region,
        "modality": descriptor.modality,
    }
    for sample in read_samples(root):
        if (sample.kind == "film") == (descriptor.input == "volume"):
            continue
        if all(value is None or getattr(sample, field) == value for field, value in wanted.items()):
            yield Input(sample.name, sample.path, descriptor.input)


def _from_folder(root: epath.Path, folder: epath.Path, kind: Literal["volume", "image"]) -> Iterator[Input]:
    entries = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    suffixes = VOLUME_SUFFIXES if kind == "volume" else IMAGE_SUFFIXES
    dicoms = []
    for path in entries:
        if path.is_dir():
            yield from _from_folder(root, path, kind)
        elif path.name.lower().endswith(suffixes):
            yield Input(path.relative_to(root).as_posix(), path, kind)
        elif _is_dicom(path):
            dicoms.append(path)
    if kind == "volume" and len(dicoms) > 1:
        name = folder.relative_to(root).as_posix()
        yield Input(folder.name if name == "." else name, folder, kind)
    else:
        yield from (Input(p.relative_to(root).as_posix(), p, kind) for p in dicoms)


def _is_dicom(path: epath.Path) -> bool:
    # Series often have no file name extension, or one number after another behind dots.
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
