"""NRRD volumes with attached or detached voxels.

Format: https://teem.sourceforge.net/nrrd/format.html. The header is parsed here because pynrrd confuses
key/value pairs with fields, truncates fractional sizes, follows data files into other folders and raises
IndexError for an empty field.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import math
import os
import re
from typing import IO, cast

import numpy as np
from etils import epath
from nibabel.affines import voxel_sizes

from vilam3_jax.data import volume_io
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.stored_volume import StoredVolume
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path

_MAX_HEADER_BYTES = 1 << 20
_MAX_SKIPPED_LINES = 10_000
_MAX_LAYERS = 256
# NRRD `space` -> signs that convert its axes to RAS.
_SPACES = {
    **dict.fromkeys(("left-posterior-superior", "left-posterior-superior-time", "lps", "lpst"), (-1, -1, 1)),
    **dict.fromkeys(("right-anterior-superior", "right-anterior-superior-time", "ras", "rast"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "left-anterior-superior-time", "las", "last"), (-1, 1, 1)),
}
_TYPES = {
    alias: code
    for code, aliases in {
        "i1": ("signed char", "int8", "int8_t"),
        "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
        "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
        "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
        "i4": ("int", "signed int", "int32", "int32_t"),
        "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
        "i8": (
            *("longlong", "long long", "long long int", "signed long long", "signed long long int"),
            *("int64", "int64_t"),
        ),
        "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
        "f4": ("float",),
        "f8": ("double",),
    }.items()
    for alias in aliases
}
_ENCODINGS = {
    "raw": "raw",
    "hex": "hex",
    **dict.fromkeys(("txt", "text", "ascii"), "text"),
    **dict.fromkeys(("gz", "gzip"), "gzip"),
    **dict.fromkeys(("bz2", "bzip2"), "bzip2"),
}
_DECOMPRESSORS = {"gzip": lambda file: gzip.GzipFile(fileobj=file), "bzip2": bz2.BZ2File}
_RATIOS = {"raw": 1, "gzip": volume_io.DEFLATE_RATIO, "bzip2": volume_io.BZIP2_RATIO}
_ALIASES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
_USED_FIELDS = frozenset(
    (
        *("dimension", "type", "sizes", "endian", "encoding", "kinds", "space", "space directions"),
        *("space origin", "space units", "spacings", "sample units", *_ALIASES.values()),
    )
)
_VECTOR = re.compile(r"\(([^()]*)\)|(none)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class _Header:
    """Fields (`name: value`) and key/value pairs (`key:=value`) as text, names in lower case.

    Errors do not repeat their text: it may name the patient.
    """

    path: epath.Path
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    pairs: dict[str, str] = dataclasses.field(default_factory=dict)
    end: int = 0  # of the header, in bytes

    def get(self, name: str) -> str:
        """A field's text; "" if absent."""
        return self.fields.get(name, "")

    def pair(self, *names: str) -> str:
        """The text of the first non-empty key/value pair; "" if there is none."""
        return next((self.pairs[name] for name in names if self.pairs.get(name)), "")

    def integers(self, name: str, default: str = "") -> list[int]:
        words = (self.get(name) or default).split()
        if not words or not all(re.fullmatch(r"[+-]?\d{1,18}", word) for word in words):
            raise self.error(f"field {name} is missing or not a list of whole numbers; export it again")
        return [int(word) for word in words]

    def numbers(self, words: list[str], name: str) -> tuple[float, ...]:
        try:
            return tuple(float(word) for word in words)
        except ValueError:
            raise self.error(f"field {name} is not a list of numbers; export it again") from None

    def vectors(self, name: str) -> list[tuple[float, ...]]:
        """Parses "(1,0,0) none (0,0,1)"; "none", which some programs write as NaN, becomes ()."""
        text = self.get(name)
        if _VECTOR.sub("", text).strip():
            raise self.error(f"field {name} is not a list of vectors; export it again")
        texts = [match[1] for match in _VECTOR.finditer(text)]
        vectors = [self.numbers(text.split(","), name) if text is not None else () for text in texts]
        return [() if all(math.isnan(number) for number in vector) else vector for vector in vectors]

    @property
    def encoding(self) -> str:
        if self.get("encoding").lower() not in _ENCODINGS:
            raise self.error("encoding is not supported; save it as raw or gzip")
        return _ENCODINGS[self.get("encoding").lower()]

    @property
    def space_dimension(self) -> int:
        return 4 if self.get("space").lower().endswith(("time", "t")) else 3

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.path}: its NRRD {problem}")


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Sizes of the spatial axes in file order, their affine (index to RAS millimetres), unit and notes."""

    shape: tuple[int, ...]
    affine: np.ndarray
    unit: str
    notes: tuple[str, ...]


def read_nrrd(path: PathLike, limits: Limits, *, voxels: bool = True) -> StoredVolume:
    """Reads a .nrrd file, or a .nhdr header with its one data file beside it.

    Modality and body part come from the DICOM keys that Slicer and others write. Without `voxels`, reads the
    header only; `values` are then zeros. Raises `UserError` for several values per voxel, no patient space,
    data in other folders or several files, an invalid header or one over `limits`, or a damaged file.
    """
    header, grid, dtype = _read_header(path, limits)
    values, notes = _values(header, dtype, math.prod(grid.shape), limits, voxels)
    modality = volume_io.modality_code(header.pair("dicom_0008_0060_modality", "0008|0060", "modality"))
    return StoredVolume(
        values.reshape(grid.shape, order="F") if voxels else volume_io.without_voxels(grid.shape, dtype),
        grid.affine,
        modality=modality,
        body_part=volume_io.body_part_name(header.pair("dicom_0018_0015_bodypartexamined", "0018|0015")),
        units=volume_io.stated_units(header.get("sample units").strip('"'), modality),
        notes=(*grid.notes, *notes),
    )


def read_nrrd_layers(path: PathLike, limits: Limits) -> tuple[list[StoredVolume], dict[str, str]]:
    """Reads an NRRD segmentation, which may hold several label maps on one grid (3D Slicer's layers).

    Returns the layers (one for a plain volume) and the file's key/value pairs, keys in lower case. Raises as
    `read_nrrd`, but several values per voxel are layers.
    """
    header, grid, dtype = _read_header(path, limits, layered=True)
    sizes = header.integers("sizes")
    layers = math.prod(sizes) // math.prod(grid.shape)
    if layers > _MAX_LAYERS or math.prod(sizes) > limits.voxels:
        raise UserError(f"{path}: {layers} layers of label maps are too many; save fewer segments per file")
    values, notes = _values(header, dtype, math.prod(sizes), limits, True)
    axes = _axes_in_space(header.vectors("space directions"), header)
    values = np.moveaxis(values.reshape(sizes, order="F"), axes, range(-len(axes), 0))
    stack = values.reshape(layers, *grid.shape)
    notes = (*grid.notes, *notes)
    return [StoredVolume(layer, grid.affine, notes=notes) for layer in stack], dict(header.pairs)


def _read_header(path: PathLike, limits: Limits, *, layered: bool = False) -> tuple[_Header, _Grid, np.dtype]:
    path = as_path(path)
    with path.open("rb") as file:
        header = _parse_header(file.read(_MAX_HEADER_BYTES), path)
    grid = _grid(header, layered)
    dtype = _dtype(header)
    volume_io.check_grid(grid.shape, dtype.itemsize, path, limits)
    volume_io.check_extent(grid.affine, grid.shape, grid.unit, path)
    return header, grid, dtype


def _parse_header(head: bytes, path: epath.Path) -> _Header:
    header = _Header(path)
    position, number = 0, 0
    while True:
        end = head.find(b"\n", position)
        # Only a detached header may end with the file.
        line = head[position : len(head) if end < 0 else end].decode("utf-8", "replace").rstrip()
        position = len(head) if end < 0 else end + 1
        number += 1
        if number == 1:
            if not re.fullmatch(r"NRRD000[1-5]", line):
                raise UserError(f"{path}: its first line is not a known version of NRRD; export it again")
        elif line and not line.startswith("#"):
            _add_line(line, number, header)
        if end < 0 and "data file" not in header.fields:
            raise header.error("header has no final empty line; fetch the file again")
        if end < 0 or not line or header.get("data file").startswith("LIST"):
            return dataclasses.replace(header, end=position)


def _add_line(line: str, number: int, header: _Header) -> None:
    if ":" not in line:
        raise header.error(f"header has no field in line {number}; export it again")
    is_pair = ":=" in line and ": " not in line[: line.index(":=")]  # keys may contain colons
    name, _, value = line.partition(":=" if is_pair else ":")
    name, value = name.strip().lower(), value.strip()
    if is_pair:
        header.pairs[name] = value if header.pairs.get(name, value) == value else ""  # "" if contradictory
        return
    name = _ALIASES.get(name, name)
    if name in _USED_FIELDS and header.fields.get(name, value) != value:
        raise header.error(f"field {name} is stated twice; export it again")
    header.fields[name] = value


def _dtype(header: _Header) -> np.dtype:
    code = _TYPES.get(header.get("type").lower())
    if code is None:
        raise header.error("type is not supported; save it as short, int or float")
    dtype = np.dtype(code)
    if dtype.itemsize == 1 or header.encoding == "text":
        return dtype
    endian = header.get("endian").lower()
    if endian not in ("little", "big"):
        raise header.error("field endian does not state the byte order; export it again")
    return dtype.newbyteorder("<" if endian == "little" else ">")


def _grid(header: _Header, layered: bool) -> _Grid:
    sizes = header.integers("sizes")
    if header.integers("dimension") != [len(sizes)]:
        raise header.error("fields dimension and sizes disagree; export it again")
    signs = _SPACES.get(header.get("space").lower())
    vectors = header.vectors("space directions")
    if signs is None or not vectors:
        raise header.error(
            "header has no patient space (such as left-posterior-superior) or no space directions, so left "
            "and right would be a guess; export it with its orientation"
        )
    origin = [vector for vector in header.vectors("space origin") if vector]
    lengths = {len(vector) for vector in (*vectors, *origin) if vector}
    if len(vectors) != len(sizes) or lengths - {header.space_dimension} or len(origin) > 1:
        raise header.error("fields sizes, space, space directions and space origin disagree; export it again")
    axes = _spatial_axes(vectors, sizes, header, layered)
    text = header.get("space units")
    units = {name.strip().lower() for name in (re.findall(r'"([^"]*)"', text) or text.split())[:3]}
    if len(units) > 1:
        raise header.error("space units differ between axes; correct them")
    unit, scale, notes = volume_io.length_unit("".join(units), "space units", header.path)
    affine = np.eye(4)
    for column, axis in enumerate(axes):
        affine[:3, column] = vectors[axis][:3]
    if len(axes) == 2:
        affine[:3, 2] = volume_io.unit_normal(affine) / scale
        notes.append("is a 2-D image, read as one slice of a volume; a thickness of 1 mm is assumed")
    if origin:
        affine[:3, 3] = origin[0][:3]
    else:
        notes.append("states no origin; 0, 0, 0 is assumed")
    if not np.isfinite(affine).all() or not affine[:3, :3].any(axis=0).all():
        raise header.error("space directions or origin have zero vectors or are not finite; correct them")
    _check_spacings(header, axes, affine)
    affine[:3] *= scale
    affine = np.diag([*signs, 1]) @ affine
    shape = (*(sizes[axis] for axis in axes), *([1] if len(axes) == 2 else []))
    return _Grid(shape, affine, unit, (*notes, *volume_io.geometry_notes(affine)))


def _spatial_axes(
    vectors: list[tuple[float, ...]], sizes: list[int], header: _Header, layered: bool
) -> list[int]:
    """The spatial axes. The others (vector "none", or time only) must have one entry, or be layers."""
    axes = _axes_in_space(vectors, header)
    others = [i for i in range(len(sizes)) if i not in axes]
    count = math.prod(sizes[i] for i in others)
    if others and count != 1 and not layered:
        kinds = header.get("kinds").lower().split()
        kinds = {kinds[i] for i in others} if len(kinds) == len(sizes) else set()
        is_series = kinds <= {"list", "time", "domain", "space", "none", "???"}
        raise volume_io.several_volumes(count, "volumes" if is_series else "values per voxel", header.path)
    if len(axes) not in (2, 3) or (header.space_dimension == 4 and any(vectors[i][3] for i in axes)):
        raise header.error(f"data has {len(axes)} axes in space, a 3-D volume is needed")
    return axes


def _axes_in_space(vectors: list[tuple[float, ...]], header: _Header) -> list[int]:
    is_timed = header.space_dimension == 4
    return [i for i, vector in enumerate(vectors) if vector and not (is_timed and not any(vector[:3]))]


def _check_spacings(header: _Header, axes: list[int], affine: np.ndarray) -> None:
    """Rejects `spacings` that contradict the space directions; the format allows only one of the two."""
    words = header.get("spacings").split()
    for axis, length in zip(axes, voxel_sizes(affine), strict=False):
        stated = abs(header.numbers(words[axis : axis + 1], "spacings")[0]) if axis < len(words) else 0.0
        if stated > 0 and abs(stated / length - 1) > 0.01:  # false for NaN, which states nothing
            raise header.error(
                f"spacings and space directions contradict each other ({stated:.4g} and {length:.4g}); "
                "remove the spacings"
            )


def _values(
    header: _Header, dtype: np.dtype, numbers: int, limits: Limits, voxels: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The values of all voxels in file order, and notes; empty and unread without `voxels`."""
    path, encoding, count = header.path, header.encoding, numbers * dtype.itemsize
    name = header.get("data file")
    source = volume_io.data_file(path, name) if name else path
    size = volume_io.check_file_size(source, limits)
    skip, lines = header.integers("byte skip", "0")[0], header.integers("line skip", "0")[0]
    lowest = -1 if encoding == "raw" else 0
    if not lowest <= skip <= limits.decoded_bytes or not 0 <= lines <= _MAX_SKIPPED_LINES:
        raise header.error("line skip or byte skip is invalid; save data and header in one file")
    with source.open("rb") as file:
        file.seek(0 if name else header.end)
        for _ in range(lines):
            file.readline(_MAX_HEADER_BYTES)
        if encoding in _RATIOS:
            volume_io.check_available(count, size - file.tell(), path, ratio=_RATIOS[encoding])
        if not voxels:
            return np.empty(0, dtype), ()
        if encoding not in _RATIOS:
            return _decode_text(file.read()[skip:], header, dtype, numbers), ()
        if skip == -1:  # the data ends with the file
            skip = size - file.tell() - count
        stream = cast(IO[bytes], _DECOMPRESSORS.get(encoding, lambda file: file)(file))
        stream.seek(skip, os.SEEK_CUR)
        raw = volume_io.read_exactly(stream, count, path)
        return np.frombuffer(raw, dtype), volume_io.read_rest(stream, path)


def _decode_text(text: bytes, header: _Header, dtype: np.dtype, numbers: int) -> np.ndarray:
    """Parses voxels written as decimal numbers or as hexadecimal bytes."""
    try:
        if header.encoding == "hex":
            values = wide = np.frombuffer(bytes.fromhex(text.decode("ascii")), dtype)
        else:
            text = text.replace(b",", b" ")  # teem accepts commas
            wide = np.fromstring(text, dtype if dtype.itemsize == 8 else np.float64, sep=" ")
            values = wide.astype(dtype)
    except ValueError as error:
        raise header.error("data is not a list of numbers; it is damaged, fetch it again") from error
    if dtype.kind != "f" and not np.array_equal(values, wide):
        raise header.error("type cannot represent all numbers; save it as float")
    if values.size != numbers:
        raise header.error(f"data has {values.size} numbers, its header promises {numbers}; fetch it again")
    return values
