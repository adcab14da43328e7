"""Images that questions are about: 2-D images and slices of volumes, with what experts need to read them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from vilam3_jax.data import dicom, file_kinds
from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.data.experts.verify.evidence import values_of
from vilam3_jax.data.images import encode_png, load_image, resize
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing, Window
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volume_io import declared_modality
from vilam3_jax.data.volume_slices import even_slices, labelled_voxels, most_labelled, numbered
from vilam3_jax.data.volumes import AXES, Volume, VolumeSource
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, exists

_ROLE = re.compile(r"[A-Za-z0-9_-]{0,16}")
ImageLike = PathLike | bytes | Image.Image | np.ndarray | Volume


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """A 2-D image, or one or several slices of a volume.

    Attributes:
      image: uint8 [H, W, 3], read at `Agent.processor.kept_size`.
      input_key: content key of the decoded image or volume, under which annotations are stored.
      axis: axis of the volume that the slice is perpendicular to; None for a 2-D image.
      index: index of the slice along `axis`.
      volume: the file of the volume, for a live expert; None without one.
      png: the 2-D image in its original size, for a live expert; b'' without one.
      role: one of several sequences, such as "t1c"; "" otherwise.
      modality: DICOM code; "" or "unknown" if unknown.
      slices: (index, image) of each slice shown; empty if `image` alone is shown.
      planes: length of `axis`; 0 for a 2-D image.
      description: for people, such as 'axial slice 57 of 0 to 113, window 50, 400'.
      notes: what was assumed or skipped while reading, and how the input differs from the training data.
    """

    image: np.ndarray
    input_key: str = ""
    axis: int | None = None
    index: int | None = None
    volume: VolumeSource | None = None
    png: bytes = b""
    role: str = ""
    modality: str = ""
    slices: tuple[tuple[int, np.ndarray], ...] = ()
    planes: int = 0
    description: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _ROLE.fullmatch(self.role):  # it is part of the prompt
            raise UserError(f"image role {self.role!r}: must be a sequence such as t1c, t1, t2 or flair")

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """All images that are shown, in order."""
        return tuple(image for _, image in self.slices) or (self.image,)

    @property
    def marker(self) -> str:
        """Its image markers in a question."""
        return numbered([index for index, _ in self.slices], self.planes) if self.slices else IMAGE_MARKER

    def shown_with(self, annotation: Annotation) -> Scan:
        """The slice that an expert's result is shown on, the one with the most labelled voxels.

        Raises `ValueError` if the label map is damaged.
        """
        if not self.slices:
            return self
        axis, shape, place = self.axis, annotation.label_shape, 0
        if axis is not None and shape is not None and shape[axis] == self.planes:
            place = most_labelled(labelled_voxels(annotation, axis), [index for index, _ in self.slices])
        index, image = self.slices[place]
        return dataclasses.replace(self, slices=self.slices[place : place + 1], index=index, image=image)


def open_image(
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
) -> Scan:
    """Reads an image, or a slice of a volume.

    Args:
      image: path of a 2-D image (PNG, JPEG, DICOM, ...) or of a volume (NIfTI, NRRD, MetaImage, a DICOM file
        or a folder of DICOM series); the bytes of a 2-D image; a PIL image; a uint8 [H, W, 3] array; or a
        `Volume`.
      size: side in pixels; None keeps the size of the image, see `ImageProcessor.kept_size`.
      axis: 'axial', 'coronal' or 'sagittal'; by default the plane of a single-slice volume, or the model's.
      index: slice along that axis; the middle one by default.
      slices: number of evenly spaced slices to show instead of one.
      window: (centre, width) in the units of the volume; by default from `preprocessing`.
      modality: DICOM code of a file that states none; refused if it contradicts the file.
      series: SeriesInstanceUID in a DICOM folder, see `load_volume`.
      frame: frame of a cine, the middle one by default, or page of a TIFF.
      preprocessing: of the model.
      decoder: a process that decodes the file; None decodes in this process.

    Raises:
      UserError: no such file, no image, no such slice, or options that do not fit the image.
    """
    if axis is not None and axis not in AXES:
        raise UserError(f"axis {axis!r}: choose one of {', '.join(AXES)}")
    if slices < 1:
        raise UserError(f"slices {slices}: must be at least 1")
    if slices > 1 and index is not None:
        raise UserError(f"slice {index} and {slices} slices: give only one of them")
    if isinstance(image, Image.Image):
        image = _png(image)
    if isinstance(image, bytes):
        with _stored(image) as path:
            if file_to_read(path, series)[1]:
                raise UserError("the bytes are those of a volume; give its path, so that experts can read it")
            return open_image(
                path,
                size,
                axis=axis,
                index=index,
                slices=slices,
                window=window,
                modality=modality,
                frame=frame,
                preprocessing=preprocessing,
                decoder=decoder,
            )
    if isinstance(image, Volume):
        return _slices(image, None, size, axis, index, slices, window, preprocessing)
    is_array = isinstance(image, np.ndarray)
    path = as_path("image array" if is_array else image)
    if not is_array:
        if not exists(path):
            raise UserError(f"{path}: no such file or folder; check --image")
        path, is_volume = file_to_read(path, series)
        if is_volume:
            if frame is not None:
                raise UserError(f"{path}: is a volume, which has slices instead of frames; choose a slice")
            source = VolumeSource(os.fspath(path), series, modality)
            volume = source.read() if decoder is None else decoder.read_volume(**dataclasses.asdict(source))
            return _slices(volume, source, size, axis, index, slices, window, preprocessing)
    if index is not None or slices > 1 or window is not None or series is not None:
        raise UserError(f"{path}: is a 2-D image, which has no slices and no window; leave these options out")
    stated, which, notes = UNKNOWN, "", ()
    if is_array:
        pixels = image
    else:
        load = load_image if decoder is None else decoder.load_image
        opened = load(path, frame=frame, alpha=preprocessing.alpha)
        pixels, stated, notes = opened.pixels, opened.modality, opened.notes
        which = f"frame {opened.frame} of 0 to {opened.frames - 1}, " if opened.frames > 1 else ""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"image array {pixels.dtype} {pixels.shape}: must be uint8 [H, W, 3]")
    if modality is not None:
        stated = declared_modality(modality, stated, path)
    return Scan(
        image=pixels if size is None else resize(pixels, size),
        input_key=image_key(pixels),
        png=encode_png(pixels),
        modality=stated,
        description=f"{which}image of {pixels.shape[1]} x {pixels.shape[0]} pixels",
        notes=(*notes, *preprocessing.notes(stated)),
    )


def _png(image: Image.Image) -> bytes:
    """The file of a PIL image, so that it is read by the rules for files."""
    buffer = io.BytesIO()
    try:
        ImageOps.exif_transpose(image).save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise UserError(f"PIL image of mode {image.mode}: cannot be stored; convert it to RGB") from error
    return buffer.getvalue()


@contextlib.contextmanager
def _stored(data: bytes) -> Iterator[epath.Path]:
    """A file with the data while it is read; errors name the bytes instead of the file."""
    with tempfile.TemporaryDirectory(prefix="vilam3-") as folder:
        path = as_path(folder) / "image"
        path.write_bytes(data)
        try:
            yield path
        except UserError as error:
            raise UserError(str(error).replace(os.fspath(path), "image bytes")) from error


def file_to_read(path: epath.Path, series: str | None) -> tuple[epath.Path, bool]:
    """The file or folder to read, and whether it is a volume; a folder may hold a single 2-D image.

    Raises `UserError` for a folder with several images and no volume.
    """
    if series is not None:
        return path, True
    is_folder = path.is_dir()
    reader = "dicom" if is_folder else file_kinds.identify(path).reader
    if reader != "dicom":
        return path, reader in ("nifti", "nifti pair", "nrrd", "metaimage")
    found, _ = dicom.survey(path)
    if not is_folder:
        return path, found[0].kind == "volume"
    members = [member for one in found if one.kind in ("image", "cine") for member in one.members]
    images = list(dict.fromkeys(as_path(member.path) for member in members))
    if any(one.kind == "volume" for one in found) or not images:
        return path, True  # the volume reader reports the other files of the folder
    if len(images) > 1:
        raise UserError(f"{path}: {len(images)} DICOM images and no volume; give one of the files")
    return images[0], False


def _slices(
    volume: Volume,
    source: VolumeSource | None,
    size: int | None,
    axis: str | None,
    index: int | None,
    slices: int,
    window: Window | None,
    preprocessing: Preprocessing,
) -> Scan:
    # The plane of a single-slice volume: any other plane would reduce it to a line.
    thin = [name for name, along in AXES.items() if volume.voxels.shape[along] == 1]
    axis = axis or (thin[0] if len(thin) == 1 else preprocessing.plane)
    along = AXES[axis]
    count = volume.voxels.shape[along]
    number = count // 2 if index is None else index
    if not 0 <= number < count:
        raise UserError(f"{volume.source}: slice {number}: it has {axis} slices 0 to {count - 1}")
    numbers: Sequence[int] = even_slices(count, slices) if slices > 1 else ()
    shown = f"slices {', '.join(map(str, numbers))}" if numbers else f"slice {number}"
    return Scan(
        image=preprocessing.slice_image(volume, along, number, window, size),
        input_key=volume.content_key,
        axis=along,
        index=number,
        volume=source,
        modality=volume.modality,
        slices=tuple((n, preprocessing.slice_image(volume, along, n, window, size)) for n in numbers),
        planes=count,
        description=f"{axis} {shown} of 0 to {count - 1}, {preprocessing.describe(volume, window)}",
        notes=(
            *volume.notes,
            *preprocessing.notes(volume.modality, volume, window),
            *_display_notes(volume, window, preprocessing),
        ),
    )


def _display_notes(volume: Volume, window: Window | None, preprocessing: Preprocessing) -> list[str]:
    """What was assumed for the display: no window for another modality, Hounsfield units for a CT."""
    modality = volume.modality
    if modality == "CT" and values_of(volume) == "not hounsfield":
        return ["The volume is declared as CT, but its values do not look like Hounsfield units; check that."]
    known = modality in (UNKNOWN, *preprocessing.modalities)
    if known or preprocessing.windows(volume, window):
        return []
    shown = preprocessing.describe(volume)
    return [f"The windows of the model are for CT, so this {modality} volume is shown {shown}."]
