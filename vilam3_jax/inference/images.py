"""The image a person asks about: a picture, or one slice of a scan, with what experts need to find it."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.images import encode_png, load_film, resize
from vilam3_jax.data.volumes import Volume, load_volume, volume_to_slice_image
from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike, as_path

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd")
# VILA-M3's display window of CT (spec of its slice extraction: -150 to 250 HU).
CT_WINDOW = (50.0, 400.0)
# Air in HU; no other modality stores values this low.
_AIR_HU = -500.0

ImageLike = PathLike | np.ndarray | Volume


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image as the model's image processor wants it.

    Attributes:
      pixels: uint8 [H, W, 3].
      input_key: content key of the decoded image or volume.
      axis: which axis of the volume is cut; None for a 2-D image.
      index: which plane along it.
      volume_path: the scan's file or folder for a live expert; '' if it has none.
      png: the 2-D image in its own size for a live expert; b'' for a slice.
      description: for people, such as 'axial slice 57 of 114'.
    """

    pixels: np.ndarray
    input_key: str
    axis: int | None
    index: int | None
    volume_path: str
    png: bytes
    description: str


def open_picture(
    image: ImageLike,
    size: int | None,
    *,
    axis: str = "axial",
    index: int | None = None,
    window: tuple[float, float] | None = None,
) -> Picture:
    """Reads what was given, and cuts the slice if it is a scan.

    Args:
      image: path of a picture (PNG, JPEG, ..., a DICOM film) or of a scan (.nii, .nii.gz, .nrrd, a DICOM
        slice or a folder with a DICOM series); or a uint8 [H, W, 3] array; or a `Volume`.
      size: side in pixels; None: as the image is, see `ImageProcessor.kept_size`.
      axis: 'axial', 'coronal' or 'sagittal'; for scans.
      index: plane along that axis; the middle one by default.
      window: (centre, width) in the scan's units; by default (50, 400) for a scan with air in HU, else the
        scan's own 0.5 and 99.5 percentiles.

    Raises:
      UserError: no such file, no image, a slice outside the scan, or slice options for a 2-D image.
    """
    if axis not in AXES:
        raise UserError(f"axis {axis!r}: choose one of {', '.join(AXES)}")
    opened, path = _open(image)
    if isinstance(opened, Volume):
        return _slice(opened, path, size, AXES[axis], axis, index, window)
    if index is not None or window is not None:
        raise UserError(f"{_name(image)}: is a 2-D image, so it has no slice and no window; leave them out")
    pixels = opened
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"image array {pixels.dtype} {pixels.shape}: must be uint8 [H, W, 3]")
    height, width = pixels.shape[:2]
    return Picture(
        pixels=pixels if size is None else resize(pixels, size),
        input_key=image_key(pixels),
        axis=None,
        index=None,
        volume_path="",
        png=encode_png(pixels),
        description=f"image of {width} x {height} pixels",
    )


def _open(image: ImageLike) -> tuple[Volume | np.ndarray, str]:
    """(scan or 2-D pixels, the scan's path or '')."""
    if isinstance(image, Volume | np.ndarray):
        return image, ""
    path = as_path(image)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check --image")
    if path.is_dir() or path.name.lower().endswith(VOLUME_SUFFIXES) or _is_cross_section(path):
        return load_volume(path), os.fspath(path)
    return load_film(path), ""


def _is_cross_section(path: PathLike) -> bool:
    """Whether a file is a DICOM image of a scanner rather than a film: its header decides, not its name."""
    with as_path(path).open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return False
        file.seek(0)
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Modality"])
        except (InvalidDicomError, OSError, ValueError) as error:
            raise UserError(f"{path}: damaged DICOM file ({error}); export it again") from error
    return str(header.get("Modality", "")) in ("CT", "MR", "PT", "NM")


def _slice(
    volume: Volume,
    path: str,
    size: int | None,
    axis: int,
    plane: str,
    index: int | None,
    window: tuple[float, float] | None,
) -> Picture:
    count = volume.voxels.shape[axis]
    number = count // 2 if index is None else index
    if not 0 <= number < count:
        raise UserError(f"{volume.source}: slice {number}: it has {plane} slices 0 to {count - 1}")
    if window is None and volume.limits[0] < _AIR_HU:
        window = CT_WINDOW
    shown = "its own percentiles" if window is None else f"window {window[0]:g}, {window[1]:g}"
    return Picture(
        pixels=volume_to_slice_image(volume, axis, number, window, size),
        input_key=volume.content_key,
        axis=axis,
        index=number,
        volume_path=path,
        png=b"",
        description=f"{plane} slice {number} of 0 to {count - 1}, {shown}",
    )


def _name(image: ImageLike) -> str:
    return "image array" if isinstance(image, np.ndarray | Volume) else os.fspath(image)
