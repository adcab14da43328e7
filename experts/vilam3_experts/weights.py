"""Pinned model files: found in a samples folder or a plain one, and refused unless their sha256 is right."""

from __future__ import annotations

import dataclasses
import hashlib

from etils import epath

from vilam3_experts.descriptors import Descriptor, WeightFile
from vilam3_jax import paths
from vilam3_jax.datasets import samples
from vilam3_jax.errors import UserError

MAX_WEIGHT_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Weights:
    """What an expert is built from.

    Attributes:
      files: name to content, already checked. Experts load from these bytes, not from the path, so that
        nothing can
        be exchanged between check and use.
      folder: the folder they came from, None if there is none.
      sha256: one digest of them all, '' without files.
    """

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    folder: epath.Path | None = None
    sha256: str = ""


def is_samples_folder(folder: paths.PathLike) -> bool:
    """Whether `folder` was written by `vilam3_jax.datasets.samples` or `.phantoms`."""
    return (paths.as_path(folder) / samples.INDEX_NAME).exists()


def locate(file: WeightFile, folder: paths.PathLike) -> epath.Path:
    """Path of a weight file: an asset of a samples folder, or by name in any other.

    Raises:
      UserError: it is not there; says which package has it.
    """
    if is_samples_folder(folder):
        try:
            return samples.asset(folder, file.asset)
        except UserError as error:
            raise UserError(f"{error}; it is {file.file} of {file.origin}") from error
    path = paths.as_path(folder) / file.file
    if not path.exists():
        raise UserError(
            f"{path}: missing; take it out of {file.origin} or point --weights at a samples folder"
        )
    return path


def read_checked(file: WeightFile, folder: paths.PathLike) -> bytes:
    """Reads a weight file.

    Raises:
      UserError: missing, or its sha256 is not the pinned one.
    """
    path = locate(file, folder)
    data = paths.read_bytes(path, MAX_WEIGHT_BYTES)
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise UserError(
            f"{path}: sha256 {found}, expected {file.sha256}; "
            f"delete it and fetch {file.file} of {file.origin} again"
        )
    return data


def load_weights(descriptor: Descriptor, folder: paths.PathLike | None) -> Weights:
    """Everything that `descriptor` needs, checked.

    Raises:
      UserError: no folder given though one is needed, a file is missing or is not the pinned one.
    """
    if folder is None:
        if descriptor.weights or descriptor.needs_folder:
            raise UserError(
                f"{descriptor.name} needs files; give --weights with a samples folder or a folder of weights"
            )
        return Weights()
    if not paths.as_path(folder).is_dir():
        raise UserError(f"{folder}: no such weights folder; check --weights")
    files = {file.name: read_checked(file, folder) for file in descriptor.weights}
    pinned = [file.sha256 for file in descriptor.weights]
    digest = hashlib.sha256("\n".join(pinned).encode()).hexdigest() if len(pinned) > 1 else "".join(pinned)
    return Weights(files, paths.as_path(folder), digest)
