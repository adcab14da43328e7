"""DICOM: the slices of one series as a volume, and single films."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
from etils import epath
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue

from vilam3_jax.data.intensity import as_stored_values, percentile_limits, window_to_uint8
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.stored_volume import StoredVolume
from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike, as_path, file_size, read_bytes

_MAX_SLICES = 10_000
_POSITION_TOLERANCE = 0.02  # relative: how far slice distances may differ before a slice counts as missing
_MAX_FILM_BYTES = 512 << 20
_NEEDED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")


# What pydicom lets through where bytes are damaged, often only when an element is looked at.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,  # pydicom: an unknown value representation or pixel compression
    OverflowError,
    BytesLengthException,
    struct.error,
)


@contextlib.contextmanager
def _naming(path: PathLike) -> Iterator[None]:
    """Turns damage of any kind into one line that names `path`."""
    try:
        yield
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged DICOM data ({reason:.200}); export it again") from error


def read_series(
    path: PathLike, *, series: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> StoredVolume:
    """Reads the slices of one series.

    Args:
      path: folder with the slices (other files in it are passed over), or one file of one slice.
      series: which series of a folder, by its UID.
      limits: bounds, checked by the headers before any pixel is decoded.

    Returns:
      values [columns, rows, slices], rescaled (HU for CT).

    Raises:
      UserError: no slices, several series or geometries in one folder, doubled or missing slices, no
        orientation.
    """
    with _naming(path):
        values, affine = _read_series(as_path(path), limits.file_bytes, limits.voxels)
        return StoredVolume(values, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _read_series(path: epath.Path, max_bytes: int, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    total = sum(file_size(p) for p in files)
    if len(files) > _MAX_SLICES or total > max_bytes:
        raise UserError(
            f"{path}: {len(files)} files of {total} bytes, over the limit; point at the folder of one series"
        )
    slices = []
    for file in files:
        header = _read(file, max_bytes, pixels=False)
        if header is not None and "Rows" in header:
            slices.append((header, file))
    if not slices:
        raise UserError(f"{path}: no DICOM images here; point at the folder that holds the slices")
    _check_one_geometry(slices, path)
    first = slices[0][0]
    count = int(first.Rows) * int(first.Columns) * len(slices)
    if count > max_voxels:
        raise UserError(f"{path}: {count} voxels, more than the limit of {max_voxels}; crop or resample it")

    across, down = np.asarray(first.ImageOrientationPatient, np.float64).reshape(2, 3)
    normal = np.cross(across, down)
    slices.sort(key=lambda item: float(np.dot(normal, np.asarray(item[0].ImagePositionPatient, np.float64))))
    positions = np.asarray([item[0].ImagePositionPatient for item in slices], np.float64)
    affine = np.eye(4)
    affine[:3, 0] = across * float(first.PixelSpacing[1])
    affine[:3, 1] = down * float(first.PixelSpacing[0])
    affine[:3, 2] = _slice_step(positions, normal, float(first.get("SliceThickness") or 1.0), path)
    affine[:3, 3] = positions[0]
    values = np.stack([_rescaled_pixels(file, max_bytes).T for _, file in slices], axis=-1)
    return values, affine


def read_film(path: PathLike) -> np.ndarray:
    """Reads a single projection image (CR, DX, mammography).

    Args:
      path: a DICOM file of one frame.

    Returns:
      [H, W] uint8, bright where tissue is dense: MONOCHROME1, which stores the opposite, is inverted. Scaled
      by the file's first window, or by percentiles where it has none.

    Raises:
      UserError: colour, several frames, or pixels that cannot be decoded.
    """
    with _naming(path):
        return _read_film(as_path(path))


def _read_film(path: epath.Path) -> np.ndarray:
    dataset = _read(path, _MAX_FILM_BYTES, pixels=True)
    if (
        dataset is None
        or int(dataset.get("NumberOfFrames") or 1) > 1
        or int(dataset.get("SamplesPerPixel", 1)) != 1
    ):
        raise UserError(f"{path}: not a grey DICOM image of one frame; export it as PNG or as a volume")
    values = as_stored_values(_rescale(_pixels(dataset, path), dataset))
    if values is None:
        raise ValueError("not one pixel is a finite number")
    center, width = (_first(dataset.get(key)) for key in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None and width > 1:
        grey = window_to_uint8(values, (center, width))
    else:
        grey = window_to_uint8(values, None, percentile_limits(values))
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0] if isinstance(value, MultiValue) else value)


def _read(path: PathLike, max_bytes: int, *, pixels: bool) -> pydicom.Dataset | None:
    """The data set; None if the file is not DICOM."""
    path = as_path(path)
    try:
        if not pixels:
            with path.open("rb") as file:
                return pydicom.dcmread(file, stop_before_pixels=True)
        return pydicom.dcmread(io.BytesIO(read_bytes(path, max_bytes)))
    except InvalidDicomError:
        return None


def _check_one_geometry(slices: list[tuple[pydicom.Dataset, Any]], path: PathLike) -> None:
    for header, file in slices:
        missing = [key for key in _NEEDED if not header.get(key)]
        if missing:
            raise UserError(
                f"{file}: DICOM image without {', '.join(missing)}; only volumes with a position can be read"
            )
        if int(header.get("NumberOfFrames") or 1) > 1 or int(header.get("SamplesPerPixel", 1)) != 1:
            raise UserError(f"{file}: multi-frame or colour DICOM; convert it to .nii.gz first")

    def distinct(*keys: str) -> int:
        return len({tuple(str(header.get(key)) for key in keys) for header, _ in slices})

    if (series := distinct("SeriesInstanceUID")) > 1:
        raise UserError(f"{path}: {series} DICOM series in one folder; give each series a folder of its own")
    if (grids := distinct("Rows", "Columns", "PixelSpacing")) > 1:
        raise UserError(f"{path}: slices of {grids} different grids in one folder; keep one series only")
    turns = np.asarray([header.ImageOrientationPatient for header, _ in slices], np.float64)
    if np.abs(turns - turns[0]).max() > 1e-3:
        raise UserError(f"{path}: slices point in different directions (a localizer?); keep one series only")


def _slice_step(positions: np.ndarray, normal: np.ndarray, thickness: float, path: PathLike) -> np.ndarray:
    """Vector from one slice to the next, [3] mm."""
    if len(positions) == 1:
        return normal * thickness
    distances = np.diff(positions @ normal)
    middle = float(np.median(distances))
    if distances.min() < 1e-3:
        raise UserError(f"{path}: two slices at one position (two phases or series?); keep one series only")
    worst = int(np.abs(distances - middle).argmax())
    if abs(distances[worst] - middle) > max(_POSITION_TOLERANCE * middle, 0.02):
        raise UserError(
            f"{path}: {distances[worst]:.2f} mm between slices {worst} and {worst + 1}, elsewhere "
            f"{middle:.2f} mm; a slice "
            "is missing, export the series again"
        )
    return (positions[-1] - positions[0]) / (len(positions) - 1)


def _rescaled_pixels(path: PathLike, max_bytes: int) -> np.ndarray:
    dataset = _read(path, max_bytes, pixels=True)
    if dataset is None:
        raise UserError(f"{path}: changed while it was read; try again")
    return _rescale(_pixels(dataset, path), dataset)


def _pixels(dataset: pydicom.Dataset, path: PathLike) -> np.ndarray:
    try:
        return dataset.pixel_array
    except (*_DAMAGE, RuntimeError) as error:
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        raise UserError(
            f"{path}: pixels of transfer syntax {getattr(syntax, 'name', syntax)} cannot be decoded "
            f"({error}); fetch it again, or "
            "`pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg`"
        ) from error


def _rescale(values: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    # float32 first: a NIfTI header can store no more, and the two files of one scan must give the same
    # numbers.
    slope = np.float64(np.float32(dataset.get("RescaleSlope", 1) or 1))
    intercept = np.float64(np.float32(dataset.get("RescaleIntercept", 0) or 0))
    return values if (slope, intercept) == (1, 0) else values.astype(np.float64) * slope + intercept
