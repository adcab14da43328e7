"""NIfTI-1 and NIfTI-2 volumes: single files and .hdr/.img pairs, compressed or not."""

from __future__ import annotations

import contextlib
import gzip
import math
import re
from collections.abc import Iterator
from typing import IO, cast

import nibabel as nib
import numpy as np
from etils import epath

from vilam3_jax.data.limits import Limits
from vilam3_jax.data.nifti_affine import Header, read_affine
from vilam3_jax.data.sidecar import read_sidecar
from vilam3_jax.data.stored_volume import StoredVolume
from vilam3_jax.data.volume_checks import (
    DEFLATE_RATIO,
    check_available,
    check_extent,
    check_file_size,
    check_grid,
    geometry_notes,
    read_exactly,
    read_rest,
    rescale,
    several_volumes,
    without_voxels,
)
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, children, file_size

_HEADER_BYTES, _HEADER_BYTES_2 = 348, 540  # of NIfTI-1 and NIfTI-2; both start with this number
_MAX_OFFSET = 256 << 20  # header extensions carry whole DICOM headers
_EOL_CHECKS = (b"\r\n\x1a\n", bytes(4))  # of NIfTI-2; anything else went through a text-mode transfer
_CIFTI_INTENTS = range(3000, 3100)
_NAME = re.compile(r"(?P<stem>.+?)\.(?P<suffix>nii|hdr|img)(?P<packed>\.gz)?", re.IGNORECASE)

# nifti1.h, codes of `datatype`.
_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_OTHER_TYPES = {
    1: "single bits",
    32: "complex numbers",
    128: "RGB colours",
    1536: "128-bit floats",
    1792: "complex numbers",
    2048: "complex numbers",
    2304: "RGBA colours",
}


def read_nifti(
    path: PathLike, limits: Limits, *, voxels: bool = True, channel: int | None = None
) -> StoredVolume:
    """Reads a NIfTI volume, with modality and units from the JSON sidecar beside it.

    Args:
      path: a single file, whatever its name, or either half of a pair.
      limits: checked by the header.
      voxels: False reads the header alone; `values` are zeros then.
      channel: which volume (from 0) of a file of several.

    Raises:
      UserError: several volumes and no `channel` or no such one, colours or complex numbers, no orientation
        or a contradictory one, a header that makes no sense, or a damaged file.
    """
    path = as_path(path)
    header_path = pair_header(path) or path
    with _opened(header_path) as (stream, _):
        head = _head(stream, path)
    header, is_pair = _header(head, path)
    if header_path != path and not is_pair:
        raise UserError(
            f"{path}: the .hdr beside it says that the voxels lie in it and not here; convert it again"
        )
    voxels_path = _other_half(header_path, "img") if is_pair else path
    check_file_size(voxels_path, limits)

    shape, notes = _shape(header, path) if channel is None else _shape_of_channels(header, channel, path)
    dtype = _dtype(header, path)
    count = check_grid(shape, dtype.itemsize, path, limits)
    slope, intercept, scaling_notes = _scaling(header, path)
    affine, unit, affine_notes = read_affine(header, shape, path)
    check_extent(affine, shape, unit, path)
    offset, offset_notes = _offset(header, is_pair, path)
    offset += (channel or 0) * count
    with _opened(voxels_path) as (stream, packed):
        check_available(offset + count, file_size(voxels_path), path, ratio=DEFLATE_RATIO if packed else 1)
        values, rest_notes = without_voxels(shape, dtype), ()
        if voxels:
            stream.seek(offset)
            raw = read_exactly(stream, count, path)
            values = rescale(np.frombuffer(raw, dtype).reshape(shape, order="F"), slope, intercept)
            rest_notes = read_rest(stream, path) if channel is None else ()
    match = _NAME.fullmatch(path.name)
    sidecar = read_sidecar(path, match["stem"] if match else path.name)
    return StoredVolume(
        values,
        affine,
        modality=sidecar.modality,
        body_part=sidecar.body_part,
        units=sidecar.units,
        notes=(
            *notes,
            *scaling_notes,
            *affine_notes,
            *geometry_notes(affine),
            *offset_notes,
            *rest_notes,
            *sidecar.notes,
        ),
    )


def pair_header(path: epath.Path) -> epath.Path | None:
    """The header of the pair whose voxels `path` holds; None if `path` is named otherwise or has none."""
    match = _NAME.fullmatch(path.name)
    if match is None or match["suffix"].lower() != "img":
        return None
    return next(iter(_halves(path, match["stem"], "hdr")), None)


def _other_half(header: epath.Path, suffix: str) -> epath.Path:
    match = _NAME.fullmatch(header.name)
    found = _halves(header, match["stem"], suffix) if match else []
    if not found:
        raise UserError(
            f"{header}: header of a .hdr/.img pair without its .img; put both into one folder under one name"
        )
    if len(found) > 1:
        raise UserError(f"{header}: pair with {found[0].name} and {found[1].name}; keep one of them")
    return found[0]


def _halves(path: epath.Path, stem: str, suffix: str) -> list[epath.Path]:
    """Files beside `path` that are called stem.suffix, in any case, compressed or not."""
    names = (f".{suffix}", f".{suffix}.gz")
    return [
        p
        for p in children(path.parent)
        if p.name.startswith(stem) and p.name[len(stem) :].lower() in names and p != path
    ]


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[tuple[IO[bytes], bool]]:
    """The file's bytes, unpacked if it is gzip, whatever its name; and whether it is."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file) if packed else file), packed


def _head(stream: IO[bytes], path: PathLike) -> bytes:
    """The bytes of the header and no more: in a short file, garbage may follow the compressed data."""
    head = read_exactly(stream, _HEADER_BYTES, path)
    sizes = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    rest = _HEADER_BYTES_2 - _HEADER_BYTES if _HEADER_BYTES_2 in sizes else 0
    return head + read_exactly(stream, rest, path)


def _header(head: bytes, path: PathLike) -> tuple[Header, bool]:
    """(the header without nibabel's repairs, whether it belongs to a pair)."""
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(head):
            break
    else:
        raise UserError(f"{path}: no NIfTI header inside; convert the file again")
    header = kind(head[: kind.template_dtype.itemsize], check=False)
    if kind is nib.Nifti2Header and header["eol_check"].tobytes() not in _EOL_CHECKS:
        raise UserError(f"{path}: was transferred as text, which damages it; fetch it again in binary mode")
    return header, cast(bytes, header["magic"].item()).startswith(b"ni")


def _shape(header: Header, path: PathLike) -> tuple[tuple[int, int, int], list[str]]:
    """The three spatial sizes; a 2-D image is one slice."""
    if int(header["intent_code"]) in _CIFTI_INTENTS:
        raise UserError(f"{path}: CIFTI file with values on brain surfaces; give the scan it belongs to")
    dims = [int(n) for n in header["dim"]]
    axes = dims[0]
    if not 2 <= axes <= 7:
        raise UserError(
            f"{path}: header of {axes} axes, a 3-D volume is needed; the file is damaged, export it again"
        )
    further = [n for n in dims[4 : axes + 1] if n not in (0, 1)]
    if further:
        if min(further) < 0:
            raise UserError(f"{path}: axes of {dims[1 : axes + 1]} voxels make no sense; export it again")
        is_vector = len(dims[5 : axes + 1]) > 0 and dims[4] in (0, 1)
        what = (
            "values per voxel (a vector, tensor or displacement field)"
            if is_vector
            else "volumes (such as time points)"
        )
        raise several_volumes(math.prod(further), what, path)
    if axes == 2 or dims[3] == 0:
        return (dims[1], dims[2], 1), ["is a 2-D image, taken as one slice of a volume"]
    return (dims[1], dims[2], dims[3]), []


def _shape_of_channels(
    header: Header, channel: int, path: PathLike
) -> tuple[tuple[int, int, int], list[str]]:
    """The spatial sizes of a file of several volumes, which lie along one further axis."""
    dims = [int(n) for n in header["dim"]]
    further = [n for n in dims[4 : min(dims[0], 7) + 1] if n not in (0, 1)]
    count = further[0] if len(further) == 1 else 1
    if not 0 <= channel < count or count == 1:
        several = f"{count} volumes" if further else "one volume"
        raise UserError(f"{path}: no channel {channel}, because it holds {several}; check the mapping")
    return (dims[1], dims[2], dims[3]), []


def _dtype(header: Header, path: PathLike) -> np.dtype:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in _TYPES:
        name = _OTHER_TYPES.get(code, f"the unknown type {code}")
        raise UserError(f"{path}: voxels of {name}, plain numbers are needed; convert the file first")
    dtype = np.dtype(_TYPES[code])
    if bits not in (0, 8 * dtype.itemsize):  # 0: left empty, and redundant
        raise UserError(
            f"{path}: its datatype {dtype.name} and its bitpix {bits} contradict each other; convert it again"
        )
    return dtype.newbyteorder(header.endianness)


def _scaling(header: Header, path: PathLike) -> tuple[float, float, tuple[str, ...]]:
    """Slope and intercept; (1, 0) where a slope of 0 or NaN says that there are none."""
    # As float32 in NIfTI-2 too, see `volumes`.
    with np.errstate(over="ignore"):
        slope, intercept = np.float32(header["scl_slope"]), np.float32(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        if np.isfinite(intercept) and intercept != 0:
            return 1, 0, (f"scl_inter {intercept:g} is ignored, because scl_slope is {slope:g}",)
        return 1, 0, ()
    if not np.isfinite([slope, intercept]).all():
        raise UserError(
            f"{path}: scaling by scl_slope {slope:g} and scl_inter {intercept:g} makes no sense; convert it "
            "again"
        )
    return float(slope), float(intercept), ()


def _offset(header: Header, is_pair: bool, path: PathLike) -> tuple[int, tuple[str, ...]]:
    """Where the voxels start, in bytes."""
    offset = float(header["vox_offset"])
    lowest = 0 if is_pair else header.template_dtype.itemsize
    if offset == 0 and not is_pair:
        after = lowest + 4  # the four bytes that announce extensions
        return after, (f"vox_offset is 0; the voxels are read from byte {after}, right after the header",)
    if not lowest <= offset <= _MAX_OFFSET or offset != int(offset):
        raise UserError(f"{path}: data offset {offset:g} makes no sense; convert the file again")
    return int(offset), ()
