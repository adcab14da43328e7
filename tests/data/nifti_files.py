"""Builders of NIfTI files whose headers nibabel would repair on writing."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np

from vilam3_jax.data.volumes import load_volume

SHAPE = (4, 5, 6)
VOXELS = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
AFFINE = np.array([[0.8, 0, 0, -30.25], [0, 0.8, 0, -41.5], [0, 0, 2.5, 107.0], [0, 0, 0, 1]])
TILTED = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3)) @ AFFINE
NO_UNIT = "the file states no unit of length; millimetres are assumed"


def header_of(shape=SHAPE, dtype=np.int16, kind=nib.Nifti1Header, sform=AFFINE, qform=AFFINE, unit="mm"):
    """A header with the transforms that are not None."""
    image = {nib.Nifti1Header: nib.Nifti1Image, nib.Nifti2Header: nib.Nifti2Image}[kind](
        np.zeros(shape, dtype), None, dtype=dtype
    )
    if sform is not None:
        image.set_sform(sform, 1)
    if qform is not None:
        image.set_qform(qform, 1, strip_shears=False)
    header = image.header.copy()
    if qform is None and sform is not None:
        header.set_zooms(np.sqrt((sform[:3, :3] ** 2).sum(axis=0)))
    header.set_xyzt_units(unit)
    header["vox_offset"] = kind.template_dtype.itemsize + 4
    return header


def save(path, voxels=VOXELS, tail=b"", header=None, **fields):
    """Writes a file with modified header fields."""
    header = header_of(voxels.shape, voxels.dtype) if header is None else header
    for name, value in fields.items():
        header[name] = value
    ordered = voxels.astype(voxels.dtype.newbyteorder(header.endianness))
    data = header.binaryblock + bytes(4) + ordered.tobytes(order="F") + tail
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


def notes(path, **more):
    return load_volume(path, **more).notes
