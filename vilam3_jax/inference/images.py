"""The image a person asks about: a picture, or one slice of a scan, with what experts need to find it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from vilam3_jax.data import dicom, file_kinds
from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.images import encode_png, load_image, resize
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing, Window
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volume_io import declared_modality
from vilam3_jax.data.volume_slices import even_slices
from vilam3_jax.data.volumes import AXES, Volume, VolumeSource
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, exists

ImageLike = PathLike | np.ndarray | Volume


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image as the model's image processor wants it.

    Attributes:
      pixels: uint8 [H, W, 3].
      input_key: content key of the decoded image or volume.
      axis: which axis of the volume is cut; None for a 2-D image.
      index: which plane along it.
      volume: where a live expert finds the scan; None without a file.
      png: the 2-D image in its own size for a live expert; b'' for a slice.
      modality: DICOM's code as stated, or "unknown".
      description: for people, such as 'axial slice 57 of 0 to 113, window 50, 400'.
      notes: what was assumed or skipped while reading, and how the input differs from the training data.
      slices: (index, pixels) of each slice, if several are shown of a volume.
      planes: of the volume along `axis`; 0 for a 2-D image.
    """

    pixels: np.ndarray
    input_key: str
    axis: int | None
    index: int | None
    volume: VolumeSource | None
    png: bytes
    modality: str
    description: str
    notes: tuple[str, ...]
    slices: tuple[tuple[int, np.ndarray], ...] = ()
    planes: int = 0


def open_picture(
    image: ImageLike,
    size: int | None,
    *,
    axis: str | None = None,
    index: int | None = None,
    slices: int = 1,
    window: Window | None = None,
    modality: str | None = None,
    series: str | None = None,
    frame: int | None = None,
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
    decoder: DecoderProcess | None = None,
) -> Picture:
    """Reads what was given, and cuts the slice if it is a scan.

    Args:
      image: path of a picture (PNG, JPEG, ..., a DICOM picture) or of a scan (NIfTI, NRRD, MetaImage, a DICOM
        file or a folder with DICOM series); or a uint8 [H, W, 3] array; or a `Volume`.
      size: side in pixels; None: as the image is, see `ImageProcessor.kept_size`.
      axis: 'axial', 'coronal' or 'sagittal', for scans; by default that of the only slice or the model's own.
      index: plane along that axis; the middle one by default.
      slices: how many evenly spaced planes of a scan are shown, instead of one.
      window: (centre, width) in the scan's units; by default as `preprocessing` says.
      modality: DICOM's code, for files that state none; another one than the file states is refused.
      series: which series of a DICOM folder, see `load_volume`.
      frame: which frame of a cine or page of a TIFF; the middle frame of a cine by default.
      preprocessing: of the model.
      decoder: decodes the file in a process of its own; None: in this one.

    Raises:
      UserError: no such file, no image, a slice outside the scan, or options that do not fit the image.
    """
    if axis is not None and axis not in AXES:
        raise UserError(f"axis {axis!r}: choose one of {', '.join(AXES)}")
    if slices < 1:
        raise UserError(f"slices {slices}: must be at least 1")
    if slices > 1 and index is not None:
        raise UserError(f"slice {index} and {slices} slices: give one of both")
    if isinstance(image, Volume):
        return _slice(image, None, size, axis, index, slices, window, preprocessing)
    if isinstance(image, np.ndarray):
        _refuse_slice_options("image array", index, slices, window, series)
        stated = UNKNOWN if modality is None else declared_modality(modality, UNKNOWN, "image array")
        return _picture(image, stated, size, "", (), preprocessing)
    path = as_path(image)
    if not exists(path):
        raise UserError(f"{path}: no such file or folder; check --image")
    path, is_volume = _what_is_meant(path, series)
    if is_volume:
        if frame is not None:
            raise UserError(f"{path}: is a volume, which has slices and no frames; choose a slice")
        source = VolumeSource(os.fspath(path), series, modality)
        volume = source.read() if decoder is None else decoder.read_volume(**dataclasses.asdict(source))
        return _slice(volume, source, size, axis, index, slices, window, preprocessing)
    _refuse_slice_options(str(path), index, slices, window, series)
    load = load_image if decoder is None else decoder.load_image
    opened = load(path, frame=frame, alpha=preprocessing.alpha)
    stated = opened.modality if modality is None else declared_modality(modality, opened.modality, path)
    which = f"frame {opened.frame} of 0 to {opened.frames - 1}, " if opened.frames > 1 else ""
    return _picture(opened.pixels, stated, size, which, opened.notes, preprocessing)


def _what_is_meant(path: epath.Path, series: str | None) -> tuple[epath.Path, bool]:
    """The file or folder to open, and whether it is read as a volume. A folder may hold a single picture."""
    if series is not None:
        return path, True
    reader = "dicom" if path.is_dir() else file_kinds.identify(path).reader
    if reader == "dicom":
        return _dicom(path)
    return path, reader in ("nifti", "nifti pair", "nrrd", "metaimage")


def _dicom(path: epath.Path) -> tuple[epath.Path, bool]:
    found, _ = dicom.survey(path)
    pictures = [as_path(file) for one in found if one.kind in ("picture", "cine") for file in _files(one)]
    if not path.is_dir():
        return path, found[0].kind == "volume"
    if any(one.kind == "volume" for one in found) or not pictures:
        return path, True  # the reader of volumes says what else is in the folder
    if len(pictures) > 1:
        raise UserError(f"{path}: {len(pictures)} DICOM pictures and no volume; give one of the files")
    return pictures[0], False


def _files(series: dicom.Series) -> list[PathLike]:
    return list(dict.fromkeys(member.path for member in series.members))


def _refuse_slice_options(
    name: str, index: int | None, slices: int, window: Window | None, series: str | None
) -> None:
    if index is not None or slices > 1 or window is not None or series is not None:
        raise UserError(f"{name}: is a 2-D image, which has no slices and no window; leave these options out")


def _picture(
    pixels: np.ndarray,
    modality: str,
    size: int | None,
    which: str,
    notes: Sequence[str],
    preprocessing: Preprocessing,
) -> Picture:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"image array {pixels.dtype} {pixels.shape}: must be uint8 [H, W, 3]")
    height, width = pixels.shape[:2]
    return Picture(
        pixels=pixels if size is None else resize(pixels, size),
        input_key=image_key(pixels),
        axis=None,
        index=None,
        volume=None,
        png=encode_png(pixels),
        modality=modality,
        description=f"{which}image of {width} x {height} pixels",
        notes=(*notes, *preprocessing.notes(modality)),
    )


def _own_plane(volume: Volume) -> str | None:
    """The plane of a scan of one slice, which any other plane would cut into a line; None otherwise."""
    thin = [axis for axis, along in AXES.items() if volume.voxels.shape[along] == 1]
    return thin[0] if len(thin) == 1 else None


def _slice(
    volume: Volume,
    source: VolumeSource | None,
    size: int | None,
    axis: str | None,
    index: int | None,
    slices: int,
    window: Window | None,
    preprocessing: Preprocessing,
) -> Picture:
    axis = axis or _own_plane(volume) or preprocessing.plane
    along = AXES[axis]
    count = volume.voxels.shape[along]
    number = count // 2 if index is None else index
    if not 0 <= number < count:
        raise UserError(f"{volume.source}: slice {number}: it has {axis} slices 0 to {count - 1}")
    numbers = even_slices(count, slices) if slices > 1 else ()
    shown = tuple((n, preprocessing.slice_image(volume, along, n, window, size)) for n in numbers)
    named = f"slices {', '.join(map(str, numbers))}" if shown else f"slice {number}"
    return Picture(
        pixels=preprocessing.slice_image(volume, along, number, window, size),
        input_key=volume.content_key,
        axis=along,
        index=number,
        volume=source,
        png=b"",
        modality=volume.modality,
        description=f"{axis} {named} of 0 to {count - 1}, {preprocessing.describe(volume, window)}",
        notes=(*volume.notes, *preprocessing.notes(volume.modality, volume, window)),
        slices=shown,
        planes=count,
    )
