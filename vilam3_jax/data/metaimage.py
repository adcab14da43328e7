"""MetaImage volumes (.mha, .mhd) with attached or detached voxels.

ITK is not used: it returns the voxels of a damaged compressed file without an error, follows
`ElementDataFile` into any folder, cannot read gs:// paths, and ignores the unit of length and the intensity
scale. Tests compare the two on sound files.

Format: https://github.com/Kitware/MetaIO, "Reference: Tags of MetaImage". World coordinates are LPS, as in
ITK and DICOM.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from typing import IO

import numpy as np

from vilam3_jax.data import volume_io
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.stored_volume import StoredVolume
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path

_MAX_HEADER_BYTES = 1 << 20
_CHUNK = 1 << 20
_MIN_COSINE = 0.2  # minimum cosine between an axis and the direction that its letter names
# MET_LONG has 4 bytes in MetaIO on every machine.
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_LPS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "I": (2, 1), "S": (2, -1)}  # letter: "from"


@dataclasses.dataclass(frozen=True)
class _Header:
    fields: dict[str, str]  # errors do not repeat values: they may name the patient
    duplicates: frozenset[str]  # names of fields with two values
    end: int  # of the header, in bytes
    path: PathLike

    def get(self, *names: str) -> str:
        """The text of a field with aliases; "" if absent."""
        found = {self.fields[name] for name in names if self.fields.get(name)}
        if len(found) > 1 or self.duplicates.intersection(names):
            raise UserError(f"{self.path}: two values of {' or '.join(names)}; remove the wrong one")
        return found.pop() if found else ""

    def numbers(self, *names: str) -> list[float]:
        try:
            return [float(word) for word in self.get(*names).split()]
        except ValueError:
            raise self.error(names[0]) from None

    def integers(self, name: str, default: int | None = None) -> list[int]:
        words = self.get(name).split()
        if not words and default is not None:
            return [default]
        if not words or not all(re.fullmatch(r"[+-]?\d{1,18}", word) for word in words):
            raise self.error(name)
        return [int(word) for word in words]

    def flag(self, *names: str, default: bool = False) -> bool:
        text = self.get(*names)
        return text[0] in "Tt1" if text else default

    def error(self, name: str) -> UserError:
        return UserError(f"{self.path}: its MetaImage field {name} is missing or invalid; export it again")


def read_metaimage(path: PathLike, limits: Limits, *, voxels: bool = True) -> StoredVolume:
    """Reads a MetaImage volume: a .mha file, or a .mhd header with its one data file beside it.

    Without `voxels`, reads the header only; `values` are then zeros. Raises `UserError` for several values
    per voxel, no orientation or voxel size, data in other folders or several files, an invalid header or
    one over `limits`, or a damaged file.
    """
    path = as_path(path)
    with path.open("rb") as file:
        header = _header(file.read(_MAX_HEADER_BYTES), path)
    shape = _shape(header)
    affine, unit, notes = _affine(header, shape)
    dtype = _dtype(header)
    count = volume_io.check_grid(shape, dtype.itemsize, path, limits)
    volume_io.check_extent(affine, shape, unit, path)
    slope, intercept, scale_notes = _scale(header)
    raw, data_notes = _data(header, count, limits, voxels)
    values = volume_io.without_voxels(shape, dtype)
    if voxels:
        values = volume_io.rescale(np.frombuffer(raw, dtype).reshape(shape, order="F"), slope, intercept)
    modality = volume_io.modality_code(
        header.get("Modality").removeprefix("MET_MOD_") or header.get("0008|0060")
    )
    return StoredVolume(
        values,
        affine,
        modality=modality,
        units=volume_io.stated_units("", modality),
        notes=(*notes, *volume_io.geometry_notes(affine), *scale_notes, *data_notes),
    )


def _header(head: bytes, path: PathLike) -> _Header:
    fields: dict[str, str] = {}
    duplicates: set[str] = set()
    position = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", position)
        line = head[position : len(head) if end < 0 else end].decode("utf-8", "replace").strip()
        match = re.match(r"([^=:]+?)\s*[=:]\s*(.*)", line)
        if match and fields.setdefault(match[1], match[2]) != match[2]:
            duplicates.add(match[1])
        if end < 0 and "ElementDataFile" not in fields:
            raise UserError(f"{path}: its MetaImage header has no ElementDataFile; fetch the file again")
        position = len(head) if end < 0 else end + 1
    return _Header(fields, frozenset(duplicates), position, path)


def _shape(header: _Header) -> tuple[int, ...]:
    sizes = header.integers("DimSize")
    if header.get("ObjectType") not in ("", "Image"):
        raise UserError(f"{header.path}: is a MetaIO object but not an image; give the scan it belongs to")
    if header.integers("NDims") != [len(sizes)]:
        raise header.error("NDims or DimSize")
    channels = header.integers("ElementNumberOfChannels", 1)[0]
    if channels != 1:
        raise volume_io.several_volumes(channels, "values per voxel (colours or vectors)", header.path)
    if math.prod(sizes[3:]) != 1:
        raise volume_io.several_volumes(math.prod(sizes[3:]), "volumes", header.path)
    if len(sizes) < 3:
        raise UserError(f"{header.path}: {len(sizes)}-D MetaImage without orientation; convert it to PNG")
    return tuple(sizes[:3])


def _affine(header: _Header, shape: tuple[int, ...]) -> tuple[np.ndarray, str, list[str]]:
    axes = header.integers("NDims")[0]
    notes: list[str] = []
    spacing = header.numbers("ElementSpacing")
    if not spacing and (spacing := header.numbers("ElementSize")):
        notes.append("states no ElementSpacing; its ElementSize is used as voxel spacing")
    matrix = header.numbers("TransformMatrix", "Rotation", "Orientation")
    if not spacing or not matrix:
        # AnatomicalOrientation alone is ambiguous: by MetaIO its letters name where the axes run to, in ITK
        # where they come from.
        raise UserError(
            f"{header.path}: MetaImage without {'TransformMatrix' if spacing else 'ElementSpacing'}, so "
            f"{'left and right' if spacing else 'its size'} would be a guess; export it with its geometry"
        )
    offset = header.numbers("Offset", "Position", "Origin")
    if not offset:
        offset = [0.0] * axes
        notes.append("states no Offset; 0, 0, 0 is assumed")
    if len(spacing) != axes or len(matrix) != axes**2 or len(offset) != axes:
        raise header.error("ElementSpacing, TransformMatrix or Offset")
    directions = np.reshape(matrix, (axes, axes)).T  # one row of the file per axis
    center = header.numbers("CenterOfRotation")
    if any(center) and not np.array_equal(directions, np.eye(axes)):
        notes.append("its CenterOfRotation is ignored, as ITK ignores it")
    unit, scale, unit_notes = volume_io.length_unit(header.get("DistanceUnits"), "DistanceUnits", header.path)
    notes += unit_notes
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3] * spacing[:3]
    affine[:3, 3] = offset[:3]
    usable = np.isfinite(affine).all() and min(spacing[:3]) > 0 and affine[:3, :3].any(axis=0).all()
    if not usable or directions[3:, :3].any():
        raise header.error("ElementSpacing, TransformMatrix or Offset")
    _check_letters(header, directions[:3, :3])
    affine[:3] *= scale
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, unit, notes


def _check_letters(header: _Header, directions: np.ndarray) -> None:
    """Rejects an AnatomicalOrientation that contradicts the matrix in both meanings of its letters."""
    letters = header.get("AnatomicalOrientation").upper()
    if len(letters) != 3 or not set(letters) <= set(_LPS):
        return  # such as "???"
    along = [sign * directions[axis, i] for i, (axis, sign) in enumerate(_LPS[letter] for letter in letters)]
    if min(along) < _MIN_COSINE and max(along) > -_MIN_COSINE:
        raise UserError(
            f"{header.path}: AnatomicalOrientation {letters} contradicts TransformMatrix; correct one of them"
        )


def _dtype(header: _Header) -> np.dtype:
    code = _TYPES.get(header.get("ElementType").upper())
    if code is None:
        raise header.error("ElementType")
    if not header.flag("BinaryData", default=True):
        raise UserError(f"{header.path}: MetaImage with voxels as text; save it as binary data")
    big = header.flag("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    return np.dtype(code).newbyteorder(">" if big else "<")


def _scale(header: _Header) -> tuple[float, float, tuple[str, ...]]:
    slope = header.numbers("ElementToIntensityFunctionSlope") or [1.0]
    intercept = header.numbers("ElementToIntensityFunctionOffset") or [0.0]
    if not np.isfinite([slope[0], intercept[0]]).all() or slope[0] == 0:
        raise header.error("ElementToIntensityFunctionSlope or Offset")
    if (slope[0], intercept[0]) == (1, 0):
        return 1.0, 0.0, ()
    note = f"scaled by its intensity function, {slope[0]:g} * x + {intercept[0]:g}, which ITK ignores"
    return slope[0], intercept[0], (note,)


def _data(header: _Header, count: int, limits: Limits, voxels: bool) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of the voxels and notes. Without `voxels`, checks but does not read them."""
    path = as_path(header.path)
    name = header.get("ElementDataFile")
    inside = name.upper() == "LOCAL"
    source = path if inside else volume_io.data_file(path, name)
    size = volume_io.check_file_size(source, limits)
    packed = header.flag("CompressedData")
    skip = header.integers("HeaderSize", 0)[0]
    if skip < -1 or (skip == -1 and packed):
        raise header.error("HeaderSize")
    start = size - count if skip == -1 else skip or (header.end if inside else 0)
    volume_io.check_available(
        count, size - max(0, start), path, ratio=volume_io.DEFLATE_RATIO if packed else 1
    )
    if not voxels:
        return b"", ()
    with source.open("rb") as file:
        file.seek(start)
        if packed:
            return _inflate(file, count, path)
        return volume_io.read_exactly(file, count, path), volume_io.trailing_note(size - start - count)


def _inflate(file: IO[bytes], count: int, path: PathLike) -> tuple[bytes, tuple[str, ...]]:
    """Reads `count` bytes of a zlib or gzip stream, and the rest up to its checksum."""
    unpack = zlib.decompressobj(wbits=47)
    data = bytearray()
    excess = 0
    while not unpack.eof and excess < volume_io.MAX_TRAILING_BYTES:
        packed = unpack.unconsumed_tail or file.read(_CHUNK)
        if not packed:
            raise UserError(f"{path}: its compressed data is cut short; fetch the file again")
        chunk = unpack.decompress(packed, _CHUNK)
        wanted = count - len(data)
        data += chunk[:wanted]
        excess += len(chunk) - len(chunk[:wanted])
    if len(data) < count:
        raise UserError(f"{path}: cut short after {len(data)} of {count} data bytes; fetch it again")
    return bytes(data), volume_io.trailing_note(excess)
