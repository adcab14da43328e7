"""Content keys: identifiers of decoded images and volumes, independent of their file format.

Annotations are looked up by the content key of their input. The key covers the decoder version, so a mask
drawn on the output of an older decoder is never applied to that of a newer one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

# Increment it whenever a reader returns other pixels, voxels or geometry for some file.
# 2: Modality and VOI LUTs, padding, palettes, alpha on white, deep colour images. 3: sign of RLE frames whose
# stored bits fill the cell.
DECODER_VERSION = 3

# Direction columns to 1e-3 mm, the origin to 1e-2: float32 headers are no more precise at 500 mm.
_AFFINE_STEPS = np.array([1e-3, 1e-3, 1e-3, 1e-2])
# Keeps rounding boundaries away from the short decimals and binary fractions that scanners write.
_AFFINE_OFFSET = 0.15


def volume_key(voxels: np.ndarray, affine: np.ndarray) -> str:
    """Key of a volume: sha256 (hex) of decoder version, dtype, shape, rounded affine and voxels.

    `voxels` are [X, Y, Z] in canonical orientation, in the type of `intensity.as_stored_values`; `affine` is
    [4, 4] float64, voxel index to RAS millimetres.
    """
    digest = _digest(voxels)
    digest.update(np.floor(affine[:3] / _AFFINE_STEPS + _AFFINE_OFFSET).astype("<i8").tobytes())
    digest.update(_little_endian(voxels).data)
    return digest.hexdigest()


def image_key(image: np.ndarray) -> str:
    """Key of an image, [H, W, 3] uint8: sha256 (hex) of decoder version, dtype, shape and pixels."""
    digest = _digest(image)
    digest.update(_little_endian(image).data)
    return digest.hexdigest()


def inputs_key(inputs: Sequence[tuple[str, str]]) -> str:
    """Key of all inputs of one expert call.

    Args:
      inputs: ordered (role, content key) pairs, such as ("t1c", "9f…"); the role of a single input is "".

    Returns:
      The content key of a single input without a role, so that an image has the same key everywhere;
      otherwise sha256 (hex) of the ordered list, so that the same scans in another order are another input.

    Raises:
      ValueError: no input, an empty key, or a repeated role.
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
