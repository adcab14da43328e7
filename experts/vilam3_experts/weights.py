"""Model files: found in a samples folder or a plain one, and refused unless their sha256 is right.

The sha256 of the sample experts' files is part of the program. Those of the released weights are recorded in
`weights.lock.json` of the weights folder when a file is first used, and pinned from then on.
"""

from __future__ import annotations

import dataclasses
import hashlib

from etils import epath

from vilam3_experts.descriptors import Descriptor, WeightFile
from vilam3_experts.weight_files.lock import Lock, pin_of_bytes, pin_of_file
from vilam3_jax.datasets import samples
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

MAX_WEIGHT_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Weights:
    """What an expert is built from.

    Attributes:
      files: name to content, already checked. Experts load from these bytes, not from the path, so that
        nothing can be exchanged between check and use.
      folder: the folder they came from, None if there is none.
      sha256: one digest of them all, '' without files.
    """

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    folder: epath.Path | None = None
    sha256: str = ""


def is_samples_folder(folder: paths.PathLike) -> bool:
    """Whether `folder` was written by `vilam3_jax.datasets.samples` or `.phantoms`."""
    return (paths.as_path(folder) / samples.INDEX_NAME).exists()


def expert_folder(folder: paths.PathLike, name: str) -> epath.Path:
    """Where an expert's files are: the folder of its name in a weights folder for all, or `folder` itself."""
    own = paths.as_path(folder) / name
    return own if own.is_dir() else paths.as_path(folder)


def locate(file: WeightFile, folder: paths.PathLike, expert: str = "") -> epath.Path:
    """Path of a weight file: an asset of a samples folder, or by name in any other.

    Args:
      file: which file.
      folder: a samples folder or a folder of weights.
      expert: name of the expert; its folder inside `folder` comes first.

    Raises:
      UserError: it is not there; says where to get it.
    """
    if file.asset and is_samples_folder(folder):
        try:
            return samples.asset(folder, file.asset)
        except UserError as error:
            raise UserError(f"{error}; it is {file.file} of {file.origin}") from error
    path = (expert_folder(folder, expert) if expert else paths.as_path(folder)) / file.file
    if not path.exists():
        raise UserError(f"{path}: missing; {_how_to_get(file, folder, expert)}")
    return path


def _how_to_get(file: WeightFile, folder: paths.PathLike, expert: str) -> str:
    if file.asset:
        return f"take it out of {file.origin} or point --weights at a samples folder"
    return f"run `vilam3-experts weights --fetch --expert {expert} --weights {folder}`"


def read_checked(file: WeightFile, folder: paths.PathLike, expert: str = "") -> bytes:
    """Reads a weight file.

    Raises:
      UserError: missing, or its sha256 is not the pinned one.
    """
    path = locate(file, folder, expert)
    data = paths.read_bytes(path, MAX_WEIGHT_BYTES)
    found = pin_of_bytes(data)
    if not file.sha256:
        Lock(folder).check(path.relative_to(paths.as_path(folder)).as_posix(), found)
    elif found.sha256 != file.sha256:
        raise UserError(
            f"{path}: sha256 {found.sha256}, expected {file.sha256}; "
            f"delete it and fetch {file.file} of {file.origin} again"
        )
    return data


def load_weights(descriptor: Descriptor, folder: paths.PathLike | None) -> Weights:
    """Everything that `descriptor` needs, checked.

    Raises:
      UserError: no folder given though one is needed, a file is missing or is not the pinned one.
    """
    name = descriptor.name
    if folder is None:
        if descriptor.weights or descriptor.needs_folder:
            raise UserError(
                f"{name} needs files; give --weights with a samples folder or a folder of weights"
            )
        return Weights()
    if not paths.as_path(folder).is_dir():
        raise UserError(f"{folder}: no such weights folder; check --weights")
    files = {file.name: read_checked(file, folder, name) for file in descriptor.weights}
    digests = [hashlib.sha256(content).hexdigest() for content in files.values()]
    if descriptor.needs_folder:
        digests += check_folder(descriptor, folder)
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest() if len(digests) > 1 else "".join(digests)
    return Weights(files, expert_folder(folder, name), digest)


def check_folder(descriptor: Descriptor, folder: paths.PathLike) -> list[str]:
    """Checks the files of an expert that works from a folder, such as a bundle, against the lock file.

    Returns:
      The sha256 of each file of its sources that is there.

    Raises:
      UserError: one is not what it was at first use.
    """
    root, own = paths.as_path(folder), expert_folder(folder, descriptor.name)
    lock = Lock(folder)
    digests = []
    downloads = [download for source in descriptor.sources for download in source.downloads]
    known = {name for d in downloads for name in (*d.results, *(pickled for pickled, _ in d.convert))}
    for name in sorted(known):
        if (path := own / name).exists():
            found = pin_of_file(path)
            lock.check(path.relative_to(root).as_posix(), found)
            digests.append(found.sha256)
    return digests
