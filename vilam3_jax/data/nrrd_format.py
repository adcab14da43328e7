"""NRRD volumes."""

from __future__ import annotations

import bz2
import gzip
import io
from typing import IO

import nrrd
import numpy as np

from vilam3_jax.data.limits import Limits
from vilam3_jax.data.stored_volume import StoredVolume
from vilam3_jax.data.volume_checks import check_grid, read_exactly
from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike

_MAX_HEADER_BYTES = 1 << 20
# NRRD `space` -> signs that turn its axes into RAS.
_NRRD_SPACES = {
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
}
_NRRD_TYPES = {
    alias: code
    for code, aliases in {
        "i1": ("signed char", "int8", "int8_t"),
        "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
        "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
        "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
        "i4": ("int", "signed int", "int32", "int32_t"),
        "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
        "f4": ("float",),
        "f8": ("double",),
    }.items()
    for alias in aliases
}


def read_nrrd(file: IO[bytes], path: PathLike, limits: Limits) -> StoredVolume:
    head = file.read(_MAX_HEADER_BYTES)
    ends = [(head.find(mark), len(mark)) for mark in (b"\n\n", b"\r\n\r\n") if mark in head]
    if not ends:
        raise UserError(
            f"{path}: NRRD header without its closing empty line (or detached); save data and header in "
            "one file"
        )
    position, width = min(ends)
    header = nrrd.read_header(io.BytesIO(head[: position + width]))
    if "data file" in header or "datafile" in header or header.get("line skip") or header.get("byte skip"):
        raise UserError(
            f"{path}: NRRD with its data elsewhere (detached or skipped); save data and header in one file"
        )
    shape = tuple(int(n) for n in header["sizes"])
    check_grid(shape, path, limits)
    signs = _NRRD_SPACES.get(str(header.get("space", "")).lower())
    if signs is None or "space directions" not in header or "space origin" not in header:
        raise UserError(
            f"{path}: NRRD without a patient space, directions and origin; export it with its orientation"
        )
    dtype = _nrrd_dtype(header, path)
    file.seek(position + width)
    encoding = str(header.get("encoding", "")).lower()
    streams = {
        "raw": lambda: file,
        "gzip": lambda: gzip.GzipFile(fileobj=file),
        "bzip2": lambda: bz2.BZ2File(file),
    }
    streams |= {"gz": streams["gzip"], "bz2": streams["bzip2"]}
    if encoding not in streams:
        raise UserError(f"{path}: NRRD encoding {encoding!r} is not read here; save it as raw or gzip")
    count = int(np.prod(shape, dtype=np.int64))
    raw = read_exactly(streams[encoding](), count * dtype.itemsize, path)
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(header["space directions"], np.float64).T
    affine[:3, 3] = header["space origin"]
    return StoredVolume(np.frombuffer(raw, dtype).reshape(shape, order="F"), np.diag([*signs, 1]) @ affine)


def _nrrd_dtype(header: dict, path: PathLike) -> np.dtype:
    name = str(header["type"])
    if name not in _NRRD_TYPES:
        raise UserError(f"{path}: NRRD type {name!r} is not read here; save it as short, int or float")
    return np.dtype(_NRRD_TYPES[name]).newbyteorder(
        ">" if str(header.get("endian")).lower() == "big" else "<"
    )
