"""Index orders of volumes, as nibabel's axis codes such as "LPS"."""

from __future__ import annotations

import nibabel as nib
import numpy as np

_CODES = nib.orientations.axcodes2ornt
_RAS = _CODES(("R", "A", "S"))
_AXES = [[x, y, z] for x in (0, 1) for y in (2, 3) for z in (4, 5)]  # positions in "LRAPIS"


def is_axcodes(value: object) -> bool:
    """Whether a value names one direction of each axis, such as "RAS"."""
    return isinstance(value, str) and sorted(map("LRAPIS".find, value)) in _AXES


def from_canonical(array: np.ndarray, affine: np.ndarray, axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """Reorders [X, Y, Z] from RAS to `axcodes`; returns a view and its affine."""
    turn = nib.orientations.ornt_transform(_RAS, _CODES(tuple(axcodes)))
    reordered = nib.orientations.apply_orientation(array, turn)
    return reordered, affine @ nib.orientations.inv_ornt_aff(turn, array.shape)


def to_canonical(array: np.ndarray, axcodes: str) -> np.ndarray:
    """Reorders [I, J, K] from `axcodes` to RAS; contiguous."""
    turn = nib.orientations.ornt_transform(_CODES(tuple(axcodes)), _RAS)
    return np.ascontiguousarray(nib.orientations.apply_orientation(array, turn))
