"""CT and MRI volumes: read any common format into one orientation, and cut the slices people know.

A volume is held in RAS canonical orientation: index 0 grows to the patient's right, index 1 to the front,
index 2 to the head, whatever order the file stores. Voxel values follow one rule, so that a scan has one
`content_key` in all formats: slope and intercept are rounded to float32 (NIfTI can store no more) and applied
in float64; if all results are whole numbers they are int16, or int32 where int16 is too narrow; otherwise
float32.
"""

from __future__ import annotations

import bz2
import dataclasses
import functools
import gzip
import hashlib
import io
import zlib
from typing import IO, cast

import nibabel as nib
import nrrd
import numpy as np
from nibabel.spatialimages import HeaderDataError

from vilam3_jax.data import dicom
from vilam3_jax.data.images import resize
from vilam3_jax.data.scaling import as_stored_values, percentile_limits, window_to_uint8
from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike, as_path, check_passing, file_size

__all__ = [
    "Volume",
    "load_label_map",
    "load_volume",
    "percentile_limits",
    "slice_2d",
    "volume_to_slice_image",
    "window_to_uint8",
]

_NIFTI_HEADER_BYTES = 540  # NIfTI-2; NIfTI-1 has 348
_MAX_HEADER_BYTES = 1 << 20
_SPACING_MM = (1e-4, 1e4)  # microscopes to whole-body scouts; anything else is a damaged header
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
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
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """One scan in RAS canonical orientation.

    Attributes:
      voxels: [X, Y, Z], int16, int32 or float32 (see the module's rule), finite. HU for CT.
      affine: [4, 4] float64, voxel index -> RAS millimetres.
      source: name of the file or folder, without its path.
    """

    voxels: np.ndarray
    affine: np.ndarray
    source: str

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres between voxels along the three axes, [3] float64."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    @functools.cached_property
    def limits(self) -> tuple[float, float]:
        """The 0.5 and 99.5 percentiles of the voxels, the display range where no window is known."""
        return percentile_limits(self.voxels)

    @functools.cached_property
    def content_key(self) -> str:
        """sha256 of dtype, shape, rounded affine and voxels: one key a scan, in any file format."""
        digest = hashlib.sha256()
        digest.update(f"{self.voxels.dtype.name}{self.voxels.shape}".encode())
        # Direction columns to 1e-3 mm, the origin to 1e-2: float32 headers are no better at 500 mm. The odd
        # offset keeps the borders between roundings away from the short decimals and binary fractions that
        # scanners write.
        steps = np.array([1e-3, 1e-3, 1e-3, 1e-2])
        digest.update(np.floor(self.affine[:3] / steps + 0.15).astype("<i8").tobytes())
        plain = self.voxels.astype(self.voxels.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(plain).data)
        return digest.hexdigest()


def load_volume(path: PathLike, *, max_bytes: int = 2 << 30, max_voxels: int = 1 << 29) -> Volume:
    """Reads a 3-D scan.

    Args:
      path: `.nii`, `.nii.gz`, `.nrrd`, a DICOM file of one slice, or a folder with the slices of one DICOM
        series.
      max_bytes: refuse larger files (the sum, for a folder) before reading.
      max_voxels: refuse larger grids, judged by the header before anything is decoded.

    Returns:
      The volume. NaN and -inf become the smallest finite value, +inf the largest.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: names the file or folder and what is wrong: unknown format, over a limit, truncated, not 3-D,
        no orientation (left and right would be a guess), several series in one folder, missing or doubled
        slices.
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        values, affine = dicom.read_series(path, max_bytes=max_bytes, max_voxels=max_voxels)
        return _canonical(values, _LPS_TO_RAS @ affine, path)
    size = file_size(path)
    if size > max_bytes:
        raise UserError(
            f"{path}: {size} bytes, more than the limit of {max_bytes}; crop it or raise max_bytes"
        )
    with path.open("rb") as file:
        start = file.read(132)
        file.seek(0)
        try:
            if start[:4] == b"NRRD":
                values, affine = _read_nrrd(file, path, max_voxels)
            elif start[128:132] == b"DICM":
                values, affine = dicom.read_series(path, max_bytes=max_bytes, max_voxels=max_voxels)
                affine = _LPS_TO_RAS @ affine
            elif path.name.endswith((".nii", ".nii.gz")):
                values, affine = _read_nifti(file, path, max_voxels)
            else:
                raise UserError(f"{path}: not NIfTI, NRRD or DICOM; convert it to .nii.gz")
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            zlib.error,
            nrrd.NRRDError,
            HeaderDataError,
        ) as error:
            check_passing(path, error)
            raise UserError(
                f"{path}: cannot be read ({error}); the file is damaged, fetch or export it again"
            ) from error
    return _canonical(values, affine, path)


def load_label_map(path: PathLike, grid: Volume) -> np.ndarray:
    """Reads an integer label volume that lies on the grid of `grid`.

    Args:
      path: any format that `load_volume` reads; whole numbers stored as floats are accepted.
      grid: the scan that the labels belong to.

    Returns:
      [X, Y, Z] uint8, or uint16 where ids exceed 255.

    Raises:
      UserError: other shape or position than `grid` (more than a tenth of a voxel apart), negative or
        fractional ids.
    """
    labels = load_volume(path)
    if labels.voxels.shape != grid.voxels.shape:
        raise UserError(
            f"{path}: label map of {labels.voxels.shape} voxels, {grid.source} has {grid.voxels.shape}; "
            "resample it"
        )
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [
        *grid.voxels.shape,
        1,
    ]
    distance = np.abs(corners @ (labels.affine - grid.affine).T).max()
    if distance > 0.1 * grid.spacing.min():
        raise UserError(
            f"{path}: label map lies {distance:.2f} mm away from {grid.source}; resample it to that grid"
        )
    if labels.voxels.dtype.kind != "i" or labels.voxels.min() < 0 or labels.voxels.max() > 65535:
        raise UserError(
            f"{path}: label ids must be whole numbers from 0 to 65535; store a label map, not probabilities"
        )
    return labels.voxels.astype(np.uint8 if labels.voxels.max() < 256 else np.uint16)


def slice_2d(voxels: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Cuts one slice as radiologists look at it.

    Args:
      voxels: [X, Y, Z] in RAS canonical orientation (scan or label map).
      axis: 0 sagittal, 1 coronal, 2 axial.
      index: slice number along `axis`.

    Returns:
      [H, W] view. Axial: front on top, patient's right on the image's left. Coronal: head on top, patient's
      right on the left. Sagittal: head on top, front on the left.

    Raises:
      UserError: `axis` or `index` outside the volume.
    """
    if axis not in (0, 1, 2) or not 0 <= index < voxels.shape[axis]:
        raise UserError(
            f"slice {index} along axis {axis} is outside a volume of {voxels.shape}; choose another index"
        )
    # All three planes are read from high to low index along both remaining axes; rows are the higher one.
    return np.take(voxels, index, axis=axis).T[::-1, ::-1]


def volume_to_slice_image(
    volume: Volume, axis: int, index: int, window: tuple[float, float] | None, size: int | None
) -> np.ndarray:
    """One slice as a picture: display orientation, windowed, resized without keeping the aspect ratio.

    Args:
      volume: the scan.
      axis: see `slice_2d`.
      index: see `slice_2d`.
      window: (centre, width) in voxel units; None takes the volume's own percentile limits.
      size: side of the result in pixels; None: a pixel for each voxel.

    Returns:
      [size, size, 3] uint8, or [h, w, 3].
    """
    plane = window_to_uint8(
        slice_2d(volume.voxels, axis, index), window, volume.limits if window is None else None
    )
    picture = np.repeat(plane[..., None], 3, axis=-1)
    return picture if size is None else resize(picture, size)


def _canonical(values: np.ndarray, affine: np.ndarray, path: PathLike) -> Volume:
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    usable = np.isfinite(affine).all() and ((spacing > _SPACING_MM[0]) & (spacing < _SPACING_MM[1])).all()
    if not usable or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise UserError(
            f"{path}: its affine is singular or absurd; correct the header's spacing and direction"
        )
    orientation = nib.orientations.io_orientation(affine)
    voxels = nib.orientations.apply_orientation(values, orientation)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, values.shape)
    finite = as_stored_values(voxels)
    if finite is None:
        raise UserError(f"{path}: not one voxel is a finite number; export it again")
    return Volume(np.ascontiguousarray(finite), affine.astype(np.float64), as_path(path).name)


def _check_voxels(shape: tuple[int, ...], path: PathLike, max_voxels: int) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(
            f"{path}: {len(shape)}-D data of shape {shape}, a 3-D volume is needed; save one volume to its "
            "own file"
        )
    # Python integers: a hostile header must not overflow the product.
    count = int(shape[0]) * int(shape[1]) * int(shape[2])
    if count > max_voxels:
        raise UserError(f"{path}: {count} voxels, more than the limit of {max_voxels}; crop or resample it")


def _read_exactly(file: IO[bytes], count: int, path: PathLike) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise UserError(
            f"{path}: ends after {len(data)} of {count} data bytes; the file is cut short, fetch it again"
        )
    file.read(1)  # reaches the end of a compressed stream, where its checksum is compared
    return data


def _read_nifti(file: IO[bytes], path: PathLike, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
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
    _check_voxels(shape, path, max_voxels)
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
    raw = _read_exactly(stream, count * dtype.itemsize, path)
    values = np.frombuffer(raw, dtype).reshape(shape, order="F")
    slope, intercept = header.get_slope_inter()
    affine = cast(np.ndarray, header.get_best_affine()).astype(np.float64)
    affine[:3] *= _MM_PER_UNIT[cast(str, header.get_xyzt_units()[0])]
    return _rescale(values, slope, intercept), affine


def _rescale(values: np.ndarray, slope: float | None, intercept: float | None) -> np.ndarray:
    factor = np.float32(1 if slope is None else slope)
    offset = np.float32(0 if intercept is None else intercept)
    if factor == 1 and offset == 0:
        return values
    return values.astype(np.float64) * np.float64(factor) + np.float64(offset)


def _read_nrrd(file: IO[bytes], path: PathLike, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
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
    _check_voxels(shape, path, max_voxels)
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
    raw = _read_exactly(streams[encoding](), count * dtype.itemsize, path)
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(header["space directions"], np.float64).T
    affine[:3, 3] = header["space origin"]
    return np.frombuffer(raw, dtype).reshape(shape, order="F"), np.diag([*signs, 1]) @ affine


def _nrrd_dtype(header: dict, path: PathLike) -> np.dtype:
    name = str(header["type"])
    if name not in _NRRD_TYPES:
        raise UserError(f"{path}: NRRD type {name!r} is not read here; save it as short, int or float")
    return np.dtype(_NRRD_TYPES[name]).newbyteorder(
        ">" if str(header.get("endian")).lower() == "big" else "<"
    )
