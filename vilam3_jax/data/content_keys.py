"""Content keys: what identifies a decoded image or volume, in whatever file format it came.

An annotation is found by the content key of its input. The decoder's version is part of the key, so that a
corrected reader never finds a mask that was drawn on what the old one saw.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

# Raise it whenever a reader starts to return other pixels, voxels or geometry for some file.
# 1: until November 2026. 2: Modality and VOI LUTs, padding, palettes, alpha on white, deep colour pictures.
DECODER_VERSION = 2

# Direction columns to 1e-3 mm, the origin to 1e-2: float32 headers are no better at 500 mm.
_AFFINE_STEPS = np.array([1e-3, 1e-3, 1e-3, 1e-2])
# Keeps the borders between roundings away from the short decimals and binary fractions that scanners write.
_AFFINE_OFFSET = 0.15


def volume_key(voxels: np.ndarray, affine: np.ndarray) -> str:
    """Key of a volume: sha256 (hex) of decoder version, dtype, shape, rounded affine and voxels.

    Args:
      voxels: [X, Y, Z] in canonical orientation, in the type of `intensity.as_stored_values`.
      affine: [4, 4] float64, voxel index to RAS millimetres.
    """
    digest = _digest(voxels)
    digest.update(np.floor(affine[:3] / _AFFINE_STEPS + _AFFINE_OFFSET).astype("<i8").tobytes())
    digest.update(_little_endian(voxels).data)
    return digest.hexdigest()


def image_key(image: np.ndarray) -> str:
    """Key of a picture, [H, W, 3] uint8: sha256 (hex) of decoder version, dtype, shape and pixels."""
    digest = _digest(image)
    digest.update(_little_endian(image).data)
    return digest.hexdigest()


def inputs_key(inputs: Sequence[tuple[str, str]]) -> str:
    """Key of everything that one expert call looks at.

    Args:
      inputs: ordered (role, content key) pairs, such as ("t1c", "9f…"); a single input has the role "".

    Returns:
      The content key itself for a single input without a role, so that one image has one key everywhere;
      otherwise sha256 (hex) of the ordered list: the same four scans in another order are another input.

    Raises:
      ValueError: no input, an empty key, or a role that occurs twice.
    """
    roles = [role for role, _ in inputs]
    if not inputs or not all(key for _, key in inputs) or len(set(roles)) != len(roles):
        raise ValueError(f"inputs need distinct roles and non-empty keys, got roles {roles}")
    if roles == [""]:
        return inputs[0][1]
    return hashlib.sha256(json.dumps([list(pair) for pair in inputs]).encode()).hexdigest()


def _digest(array: np.ndarray) -> hashlib._Hash:
    return hashlib.sha256(f"{DECODER_VERSION}:{array.dtype.name}{array.shape}".encode())


def _little_endian(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
