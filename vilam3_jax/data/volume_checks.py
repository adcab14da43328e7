"""Checks that every reader of volumes makes."""

from __future__ import annotations

from typing import IO

from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike


def check_grid(shape: tuple[int, ...], path: PathLike, limits: Limits) -> None:
    """Refuses what is not 3-D, empty, or larger than `limits.voxels`.

    Raises:
      UserError: names the file.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(
            f"{path}: {len(shape)}-D data of shape {shape}, a 3-D volume is needed; save one volume to its "
            "own file"
        )
    # Python integers: a hostile header must not overflow the product.
    count = int(shape[0]) * int(shape[1]) * int(shape[2])
    if count > limits.voxels:
        raise UserError(
            f"{path}: {count} voxels, more than the limit of {limits.voxels}; crop or resample it"
        )


def read_exactly(file: IO[bytes], count: int, path: PathLike) -> bytes:
    """Reads `count` bytes of voxels, and the end of a compressed stream, where its checksum is compared.

    Raises:
      UserError: the file ends before.
    """
    data = file.read(count)
    if len(data) < count:
        raise UserError(
            f"{path}: ends after {len(data)} of {count} data bytes; the file is cut short, fetch it again"
        )
    file.read(1)
    return data
