"""Small scans with label maps, stored in any orientation, for synthetic copies of volume datasets."""

from __future__ import annotations

from collections.abc import Mapping

import nibabel as nib
import numpy as np

SHAPE = (40, 36, 20)  # of canonical voxels: right, front, head
SPACING = (1.5, 1.5, 2.0)
Box = tuple[slice, slice, slice]


def box(x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]) -> Box:
    """A block of canonical voxels."""
    return slice(*x), slice(*y), slice(*z)


BODY = box((4, 36), (4, 32), (2, 18))


def body(seed: int) -> np.ndarray:
    """A CT of soft tissue in air, [40, 36, 20] int16; planes 0, 1, 18 and 19 are air."""
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[BODY] = np.random.default_rng(seed).integers(0, 80, voxels[BODY].shape)
    return voxels


def marked(boxes: Mapping[int, Box | list[Box]]) -> np.ndarray:
    """Label id → blocks; later ids overwrite earlier ones. [40, 36, 20] uint8."""
    labels = np.zeros(SHAPE, np.uint8)
    for label, blocks in boxes.items():
        for block in blocks if isinstance(blocks, list) else [blocks]:
            labels[block] = label
    return labels


def stored(voxels: np.ndarray, codes: str = "RAS", tilt: float = 0.0) -> bytes:
    """Encodes canonical voxels as a NIfTI file.

    Args:
      voxels: in RAS order.
      codes: index order of the file, such as "LPS".
      tilt: rotation about the left-right axis, in degrees.
    """
    angle = np.deg2rad(tilt)
    turn = np.array(
        [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    ) @ np.diag(SPACING)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, (-30.0, -25.0, 100.0)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    turned = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    image = image.as_reoriented(turned.tolist())
    return image.to_bytes()
