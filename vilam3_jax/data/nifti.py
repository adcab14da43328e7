"""NIfTI-1 and NIfTI-2 volumes: single files and .hdr/.img pairs, optionally compressed."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import re
from collections.abc import Iterator
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from etils import epath

from vilam3_jax.data import volume_io
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.nifti_affine import Header, read_affine
from vilam3_jax.data.stored_volume import UNKNOWN, StoredVolume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import PathLike, as_path, children, file_size, read_bytes

_HEADER_BYTES, _HEADER_BYTES_2 = 348, 540  # of NIfTI-1 and NIfTI-2; both start with this number
_MAX_SIDECAR_BYTES = 4 << 20
_MAX_OFFSET = 256 << 20  # header extensions can contain whole DICOM headers
_EOL_CHECKS = (b"\r\n\x1a\n", bytes(4))  # of NIfTI-2; a text-mode transfer changes it
_CIFTI_INTENTS = range(3000, 3100)
_NAME = re.compile(r"(?P<stem>.+?)\.(?P<suffix>nii|hdr|img)(?P<packed>\.gz)?", re.IGNORECASE)
# nifti1.h, codes of `datatype`.
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"}
_TYPES |= {256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_OTHER_TYPES = {
    1: "single bits",
    128: "RGB colours",
    1536: "128-bit floats",
    2304: "RGBA colours",
    **dict.fromkeys((32, 1792, 2048), "complex numbers"),
}


def read_nifti(
    path: PathLike, limits: Limits, *, voxels: bool = True, channel: int | None = None
) -> StoredVolume:
    """Reads a NIfTI volume, with modality and units from the JSON sidecar beside it.

    Args:
      path: a single file of any name, or either half of a pair.
      limits: checked against the header.
      voxels: False reads the header only; `values` are then zeros.
      channel: which volume (from 0) of a file with several.

    Raises:
      UserError: several volumes and no valid `channel`, colours or complex numbers, no orientation or a
        contradictory one, an invalid header, or a damaged file.
    """
    path = as_path(path)
    header_path = pair_header(path) or path
    header, is_pair = _read_header(header_path, path)
    if header_path != path and not is_pair:
        raise UserError(f"{path}: the .hdr beside it is a single file with its own voxels; convert it again")
    voxels_path = path
    if is_pair:
        match = _NAME.fullmatch(header_path.name)
        found = _halves(header_path, match["stem"], "img") if match else []
        if len(found) != 1:
            several = f"with {' and '.join(p.name for p in found)}; keep one of them"
            lone = "without its .img; put both into one folder under one name"
            raise UserError(f"{header_path}: .hdr of a pair {several if found else lone}")
        voxels_path = found[0]
    volume_io.check_file_size(voxels_path, limits)

    shape, notes = _shape(header, path) if channel is None else (_channel_shape(header, channel, path), [])
    dtype = _dtype(header, path)
    count = volume_io.check_grid(shape, dtype.itemsize, path, limits)
    slope, intercept, scaling_notes = _scaling(header, path)
    affine, unit, affine_notes = read_affine(header, shape, path)
    volume_io.check_extent(affine, shape, unit, path)
    offset, offset_notes = _offset(header, is_pair, path)
    notes += [*scaling_notes, *affine_notes, *volume_io.geometry_notes(affine), *offset_notes]
    offset += (channel or 0) * count
    with _open(voxels_path) as (stream, packed):
        ratio = volume_io.DEFLATE_RATIO if packed else 1
        volume_io.check_available(offset + count, file_size(voxels_path), path, ratio=ratio)
        values = volume_io.without_voxels(shape, dtype)
        if voxels:
            stream.seek(offset)
            raw = volume_io.read_exactly(stream, count, path)
            stored = np.frombuffer(raw, dtype).reshape(shape, order="F")
            values = volume_io.rescale(stored, slope, intercept)
            notes += volume_io.read_rest(stream, path) if channel is None else ()
    match = _NAME.fullmatch(path.name)
    stem = match["stem"] if match else path.name
    return _with_sidecar(StoredVolume(values, affine, notes=tuple(notes)), path, stem)


def pair_header(path: epath.Path) -> epath.Path | None:
    """The header beside `path`, if `path` is named like the voxels of a pair and has one."""
    match = _NAME.fullmatch(path.name)
    if match is None or match["suffix"].lower() != "img":
        return None
    return next(iter(_halves(path, match["stem"], "hdr")), None)


def _halves(path: epath.Path, stem: str, suffix: str) -> list[epath.Path]:
    """Files beside `path` named stem.suffix or stem.suffix.gz, suffix in any case."""
    names = (f".{suffix}", f".{suffix}.gz")
    return [
        p
        for p in children(path.parent)
        if p.name.startswith(stem) and p.name[len(stem) :].lower() in names and p != path
    ]


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[tuple[IO[bytes], bool]]:
    """Yields the decompressed stream and whether the file is gzip, whatever its name."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file) if packed else file), packed


def _read_header(header_path: epath.Path, path: PathLike) -> tuple[Header, bool]:
    """(header without nibabel's repairs, whether it belongs to a pair)."""
    # Reads no further than the header: in a short file, garbage may follow the compressed data.
    with _open(header_path) as (stream, _):
        raw = volume_io.read_exactly(stream, _HEADER_BYTES, path)
        if _HEADER_BYTES_2 in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")):
            raw += volume_io.read_exactly(stream, _HEADER_BYTES_2 - _HEADER_BYTES, path)
    kind = next((k for k in (nib.Nifti1Header, nib.Nifti2Header) if k.may_contain_header(raw)), None)
    if kind is None:
        raise UserError(f"{path}: no NIfTI header inside; convert the file again")
    header = kind(raw[: kind.template_dtype.itemsize], check=False)
    if kind is nib.Nifti2Header and header["eol_check"].tobytes() not in _EOL_CHECKS:
        raise UserError(f"{path}: damaged by a transfer in text mode; fetch it again in binary mode")
    return header, cast(bytes, header["magic"].item()).startswith(b"ni")


def _shape(header: Header, path: PathLike) -> tuple[tuple[int, int, int], list[str]]:
    """The three spatial sizes; a 2-D image is one slice."""
    if int(header["intent_code"]) in _CIFTI_INTENTS:
        raise UserError(f"{path}: CIFTI file with values on brain surfaces; give the scan it belongs to")
    dims = [int(n) for n in header["dim"]]
    axes = dims[0]
    if not 2 <= axes <= 7:
        raise UserError(f"{path}: header of {axes} axes, a 3-D volume is needed; export it again")
    further = [n for n in dims[4 : axes + 1] if n not in (0, 1)]
    if further:
        if min(further) < 0:
            raise UserError(f"{path}: axes of {dims[1 : axes + 1]} voxels are impossible; export it again")
        is_vector = len(dims[5 : axes + 1]) > 0 and dims[4] in (0, 1)
        kind = "values per voxel (a vector, tensor or displacement field)"
        raise volume_io.several_volumes(
            math.prod(further), kind if is_vector else "volumes (such as time points)", path
        )
    if axes == 2 or dims[3] == 0:
        return (dims[1], dims[2], 1), ["is a 2-D image, read as one slice of a volume"]
    return (dims[1], dims[2], dims[3]), []


def _channel_shape(header: Header, channel: int, path: PathLike) -> tuple[int, int, int]:
    """The spatial sizes of a file with several volumes along one further axis."""
    dims = [int(n) for n in header["dim"]]
    further = [n for n in dims[4 : min(dims[0], 7) + 1] if n not in (0, 1)]
    count = further[0] if len(further) == 1 else 1
    if not 0 <= channel < count or count == 1:
        several = f"{count} volumes" if further else "one volume"
        raise UserError(f"{path}: has {several} and no channel {channel}; correct the mapping")
    return dims[1], dims[2], dims[3]


def _dtype(header: Header, path: PathLike) -> np.dtype:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in _TYPES:
        name = _OTHER_TYPES.get(code, f"the unknown type {code}")
        raise UserError(f"{path}: voxels of {name}, plain numbers are needed; convert the file first")
    dtype = np.dtype(_TYPES[code])
    if bits not in (0, 8 * dtype.itemsize):  # 0: left empty, as it is redundant
        raise UserError(f"{path}: its datatype {dtype.name} contradicts its bitpix {bits}; convert it again")
    return dtype.newbyteorder(header.endianness)


def _scaling(header: Header, path: PathLike) -> tuple[float, float, tuple[str, ...]]:
    """Slope, intercept and notes; a slope of 0 or NaN means no scaling."""
    # float32 in NIfTI-2 too, see `volumes`.
    with np.errstate(over="ignore"):
        slope, intercept = np.float32(header["scl_slope"]), np.float32(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        if np.isfinite(intercept) and intercept != 0:
            return 1, 0, (f"scl_inter {intercept:g} is ignored, because scl_slope is {slope:g}",)
        return 1, 0, ()
    if not np.isfinite([slope, intercept]).all():
        raise UserError(f"{path}: scl_slope {slope:g} or scl_inter {intercept:g} is invalid; convert it")
    return float(slope), float(intercept), ()


def _offset(header: Header, is_pair: bool, path: PathLike) -> tuple[int, tuple[str, ...]]:
    """Byte offset of the voxels, and notes."""
    offset = float(header["vox_offset"])
    lowest = 0 if is_pair else header.template_dtype.itemsize
    if offset == 0 and not is_pair:
        after = lowest + 4  # the four bytes that announce extensions
        return after, (f"vox_offset is 0; the voxels are read from byte {after}, right after the header",)
    if not lowest <= offset <= _MAX_OFFSET or offset != int(offset):
        raise UserError(f"{path}: data offset {offset:g} is invalid; convert the file again")
    return int(offset), ()


def _with_sidecar(volume: StoredVolume, path: epath.Path, stem: str) -> StoredVolume:
    """Adds modality, body part and units from the JSON file that dcm2niix and BIDS put beside a volume.

    Other fields may identify the patient and are not read. An unreadable file becomes a note.
    """
    # No listing: a folder may hold thousands of volumes, and `stem` is not text from a file.
    names = (path.parent / f"{stem}{suffix}" for suffix in (".json", ".JSON"))
    found = next((name for name in names if name.exists()), None)
    if found is None:
        return volume
    try:
        fields = json.loads(read_bytes(found, _MAX_SIDECAR_BYTES).decode("utf-8-sig"))
    except UnavailableError:
        raise
    except (UserError, ValueError, RecursionError):
        fields = None
    notes = list(volume.notes)
    if not isinstance(fields, dict):
        fault = "cannot be read" if fields is None else "is not an object"
        return dataclasses.replace(volume, notes=(*notes, f"the JSON file beside it {fault}; it is ignored"))
    stated = _text(fields, "Modality", notes)
    modality = volume_io.modality_code(stated)
    if stated and modality == UNKNOWN:
        notes.append("the JSON file beside it states an unknown modality; it is ignored")
    return dataclasses.replace(
        volume,
        modality=modality,
        body_part=volume_io.body_part_name(_text(fields, "BodyPartExamined", notes)),
        units=volume_io.stated_units(_text(fields, "Units", notes), modality),
        notes=tuple(notes),
    )


def _text(fields: dict[str, Any], key: str, notes: list[str]) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if isinstance(value, str):
        return " ".join(value.split())
    notes.append(f"{key} in the JSON file beside it is not text; it is ignored")
    return ""
