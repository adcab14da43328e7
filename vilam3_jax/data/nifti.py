"""NIfTI-1 and NIfTI-2 volumes."""

from __future__ import annotations

import gzip
from typing import IO, cast

import nibabel as nib
import numpy as np

from vilam3_jax.data.limits import Limits
from vilam3_jax.data.stored_volume import StoredVolume
from vilam3_jax.data.volume_checks import check_grid, read_exactly
from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike

_NIFTI_HEADER_BYTES = 540  # NIfTI-2; NIfTI-1 has 348
_MAX_HEADER_BYTES = 1 << 20
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def read_nifti(file: IO[bytes], path: PathLike, limits: Limits) -> StoredVolume:
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file
    head = stream.read(_NIFTI_HEADER_BYTES)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(head):
            header = kind(head[: kind.template_dtype.itemsize], check=False)  # no silent repairs
            break
    else:
        raise UserError(f"{path}: no NIfTI header inside; convert the file again")
    if cast(bytes, header["magic"].item()).startswith(b"ni"):
        raise UserError(f"{path}: header of a .hdr/.img pair; convert both into one .nii.gz")
    shape = tuple(int(n) for n in header.get_data_shape())
    shape = shape[:3] if all(n == 1 for n in shape[3:]) else shape
    check_grid(shape, path, limits)
    if header["qform_code"] == 0 and header["sform_code"] == 0:
        raise UserError(
            f"{path}: the header has no orientation (qform and sform codes are 0); set it where the scan "
            "was converted"
        )
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise UserError(
            f"{path}: voxels of type {dtype}, numbers are needed; convert colour or complex data first"
        )
    offset = int(header.get_data_offset())
    if not 348 <= offset <= _MAX_HEADER_BYTES:
        raise UserError(f"{path}: data offset {offset} makes no sense; convert the file again")
    count = int(np.prod(shape, dtype=np.int64))
    stream.seek(offset)
    raw = read_exactly(stream, count * dtype.itemsize, path)
    values = np.frombuffer(raw, dtype).reshape(shape, order="F")
    slope, intercept = header.get_slope_inter()
    affine = cast(np.ndarray, header.get_best_affine()).astype(np.float64)
    affine[:3] *= _MM_PER_UNIT[cast(str, header.get_xyzt_units()[0])]
    return StoredVolume(_rescale(values, slope, intercept), affine)


def _rescale(values: np.ndarray, slope: float | None, intercept: float | None) -> np.ndarray:
    factor = np.float32(1 if slope is None else slope)
    offset = np.float32(0 if intercept is None else intercept)
    if factor == 1 and offset == 0:
        return values
    return values.astype(np.float64) * np.float64(factor) + np.float64(offset)
