"""Model files: located in a samples folder or a weights folder, and refused unless their sha256 matches.

The sha256 of the sample experts' files is part of the program. Those of the released weights are recorded in
`weights.lock.json` of the weights folder at first use, and pinned from then on.
"""

from __future__ import annotations

import dataclasses
import hashlib

from etils import epath

from vilam3_experts.descriptors import Descriptor, WeightFile
from vilam3_experts.weight_files.lock import LockFile, pin_of_bytes, pin_of_file
from vilam3_jax.datasets import samples
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

MAX_WEIGHT_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Weights:
    """What an expert is built from.

    `files` maps names to verified content. Experts load from these bytes instead of the path, so the content
    cannot change between check and use. `sha256` is the digest of all files, or ''.
    """

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    folder: epath.Path | None = None
    sha256: str = ""


def is_samples_folder(folder: paths.PathLike) -> bool:
    """Whether `folder` was written by `vilam3_jax.datasets.samples` or `.phantoms`."""
    return (paths.as_path(folder) / samples.INDEX_NAME).exists()


def weights_folder(weights: paths.PathLike | None, data: paths.PathLike) -> paths.PathLike | None:
    """`weights`; if that is None, `data` if it is a samples folder."""
    return data if weights is None and is_samples_folder(data) else weights


def expert_folder(folder: paths.PathLike, name: str) -> epath.Path:
    """The expert's subfolder of a shared weights folder if it exists, else `folder` itself."""
    own = paths.as_path(folder) / name
    return own if own.is_dir() else paths.as_path(folder)


def locate(file: WeightFile, folder: paths.PathLike, expert: str) -> epath.Path:
    """Path of a weight file: an asset of a samples folder, or a file name in a weights folder.

    The subfolder of `expert` is preferred. Raises `UserError`, which says where to get a missing file.
    """
    if file.asset and is_samples_folder(folder):
        try:
            return samples.asset(folder, file.asset)
        except UserError as error:
            raise UserError(f"{error}; it is {file.file} of {file.origin}") from error
    path = expert_folder(folder, expert) / file.file
    if not path.exists():
        fix = f"run `vilam3-experts weights --fetch --expert {expert} --weights {folder}`"
        if file.asset:
            fix = f"take it out of {file.origin} or point --weights at a samples folder"
        raise UserError(f"{path}: missing; {fix}")
    return path


def read_checked(file: WeightFile, folder: paths.PathLike, expert: str) -> bytes:
    """Reads a weight file; raises `UserError` if it is missing or its sha256 is not the pinned one."""
    path = locate(file, folder, expert)
    data = paths.read_bytes(path, MAX_WEIGHT_BYTES)
    found = pin_of_bytes(data)
    if not file.sha256:
        LockFile(folder).check(path.relative_to(paths.as_path(folder)).as_posix(), found)
    elif found.sha256 != file.sha256:
        raise UserError(
            f"{path}: sha256 {found.sha256}, expected {file.sha256}; "
            f"delete it and fetch {file.file} of {file.origin} again"
        )
    return data


def load_weights(descriptor: Descriptor, folder: paths.PathLike | None) -> Weights:
    """Loads and verifies all weights of an expert.

    Raises `UserError` if the folder or a file is missing, or a file is not the pinned one.
    """
    name = descriptor.name
    if folder is None:
        if descriptor.weights or descriptor.needs_folder:
            raise UserError(f"{name} needs files; give --weights with a samples or weights folder")
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
    """Checks the files of an expert that reads a whole folder, such as a bundle, against the lock file.

    Returns the sha256 of each existing file of the expert's sources; raises `UserError` if one changed.
    """
    root, own = paths.as_path(folder), expert_folder(folder, descriptor.name)
    lock = LockFile(folder)
    digests = []
    downloads = [download for source in descriptor.sources for download in source.downloads]
    names = {name for d in downloads for name in (*d.results, *(pickled for pickled, _ in d.convert))}
    for name in sorted(names):
        if (path := own / name).exists():
            found = pin_of_file(path)
            lock.check(path.relative_to(root).as_posix(), found)
            digests.append(found.sha256)
    return digests
