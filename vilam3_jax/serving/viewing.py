"""What the page shows of uploaded files: slices of volumes and 2-D images, rendered as for the model."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import re
import threading
from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np

from vilam3_jax.data.images import LoadedImage, encode_png
from vilam3_jax.data.intensity import CT_WINDOWS
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.data.preprocessing import Preprocessing, Window
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volume_io import declared_modality
from vilam3_jax.data.volumes import AXES, Volume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.inference.images import file_to_read
from vilam3_jax.runtime.paths import as_path
from vilam3_jax.serving.errors import bad_request
from vilam3_jax.serving.files import FileStore, StoredFile

CT_PRESETS: dict[str, Window] = {
    "brain": CT_WINDOWS["brain"][0],
    "lung": CT_WINDOWS["lung"][0],
    "abdomen": CT_WINDOWS["soft_tissue"][0],
    "bone": CT_WINDOWS["bone"][0],
}
MIN_MAX, MODEL = "minmax", "model"
_MAX_BYTES = 2 << 30
_INDEX = re.compile(r"\d{1,7}", re.ASCII)
_NUMBER = r"-?\d{1,7}(?:\.\d{1,6})?"
_WINDOW = re.compile(rf"({_NUMBER}),({_NUMBER})", re.ASCII)


@dataclasses.dataclass(frozen=True)
class SliceQuery:
    """A slice that a client asks for.

    Attributes:
      axis: 'axial', 'coronal' or 'sagittal'; None for the plane of the model.
      index: None for the middle.
      window: (centre, width), a name of `CT_PRESETS`, 'minmax', or 'model' for that of the model.
      modality: DICOM code that the client states, or None.
    """

    axis: str | None = None
    index: int | None = None
    window: Window | str = MODEL
    modality: str | None = None


def slice_query(query: Mapping[str, str], *allowed: str) -> SliceQuery:
    """Reads the parameters of a URL; `ApiError` names what is wrong."""
    for name in query:
        if name not in allowed:
            raise bad_request(f"{name}: unknown parameter; use {', '.join(allowed) or 'none'}", name)
    axis, index, modality = query.get("axis"), query.get("index"), query.get("modality")
    if axis is not None and axis not in AXES:
        raise bad_request(f"axis: must be one of {', '.join(sorted(AXES))}", "axis")
    if index is not None and not _INDEX.fullmatch(index):
        raise bad_request("index: must be the number of a slice, from 0", "index")
    if modality is not None and not re.fullmatch(r"[A-Za-z]{1,16}", modality):
        raise bad_request("modality: must be a DICOM code such as CT or MR", "modality")
    return SliceQuery(
        axis, None if index is None else int(index), _window(query.get("window", MODEL)), modality
    )


def _window(text: str) -> Window | str:
    if text in CT_PRESETS or text in (MIN_MAX, MODEL):
        return text
    if found := _WINDOW.fullmatch(text):
        centre, width = map(float, found.groups())
        if width > 0:
            return centre, width
    names = ", ".join((*CT_PRESETS, MIN_MAX, MODEL))
    raise bad_request(f"window: must be {names}, or CENTRE,WIDTH with a width above 0", "window")


class Viewer:
    """Renders slices of uploaded files; thread-safe. Volumes that were shown last stay in memory."""

    def __init__(
        self,
        store: FileStore,
        decoder: DecoderProcess,
        preprocessing: Preprocessing,
        *,
        max_bytes: int = _MAX_BYTES,
    ):
        """`max_bytes` limits the volumes in memory; the last one is kept whatever its size."""
        self._store, self._decoder, self._preprocessing = store, decoder, preprocessing
        self._max_bytes = max_bytes
        self._recent: collections.OrderedDict[str, StoredFile] = collections.OrderedDict()
        self._lock = threading.Lock()

    def describe(self, stored: StoredFile, modality: str | None = None) -> dict[str, Any]:
        """What a client needs to show a file: its kind, planes, windows and notes."""
        shown = self._read(stored, modality)
        if isinstance(shown, LoadedImage):
            height, width = shown.pixels.shape[:2]
            known = shown.modality if modality is None else modality
            notes = (*shown.notes, *self._preprocessing.notes(known))
            return {
                "kind": "image",
                "modality": known,
                "width": width,
                "height": height,
                "notes": list(notes),
            }
        notes = (*shown.notes, *self._preprocessing.notes(shown.modality, shown))
        windows: dict[str, Window] = {**CT_PRESETS, MIN_MAX: _full_range(shown)}
        return {
            "kind": "volume",
            "modality": shown.modality,
            "units": shown.units,
            "shape": list(shown.voxels.shape),
            "plane": self._plane(shown),
            "planes": {name: _plane_size(shown, axis) for name, axis in AXES.items()},
            "display": self._preprocessing.describe(shown),
            "range": self._range(shown),
            "windows": windows if shown.modality == "CT" else {},
            "notes": list(notes),
        }

    def png(self, stored: StoredFile, query: SliceQuery) -> bytes:
        """A slice, one pixel per voxel, or a 2-D image. Raises `ApiError` for a slice that does not exist."""
        shown = self._read(stored, query.modality)
        if isinstance(shown, LoadedImage):
            if query != SliceQuery(modality=query.modality):
                raise bad_request("this is a 2-D image, which has no slices and no window; leave them out")
            return encode_png(shown.pixels)
        axis = query.axis or self._plane(shown)
        count = shown.voxels.shape[AXES[axis]]
        index = count // 2 if query.index is None else query.index
        if index >= count:
            raise bad_request(f"index: there are {axis} slices 0 to {count - 1}", "index")
        image = self._preprocessing.slice_image(shown, AXES[axis], index, _chosen(shown, query.window))
        return encode_png(image)

    def nifti(self, stored: StoredFile) -> bytes:
        """A volume in canonical orientation as NIfTI, whatever the format of its file."""
        shown = self._read(stored, None)
        if isinstance(shown, LoadedImage):
            raise bad_request("this is a 2-D image, not a volume")
        return nifti_bytes(shown.voxels, shown.affine)

    def _plane(self, volume: Volume) -> str:
        """The plane of a single-slice volume, else that of the model, as `open_image` chooses."""
        thin = [name for name, axis in AXES.items() if volume.voxels.shape[axis] == 1]
        return thin[0] if len(thin) == 1 else self._preprocessing.plane

    def _range(self, volume: Volume) -> tuple[float, float]:
        """The values that the model sees as black and white; of its first window if it has several."""
        if windows := self._preprocessing.windows(volume):
            centre, width = windows[0]
            return centre - width / 2, centre + width / 2
        return volume.percentile_limits(self._preprocessing.percentiles)

    def _read(self, stored: StoredFile, modality: str | None) -> Volume | LoadedImage:
        """The file, from memory if it was shown before."""
        try:
            shown = stored.shown
            if shown is None:
                with self._lock:  # the decoder reads one at a time, too
                    shown = stored.shown
                    if shown is None:
                        shown = stored.shown = self._decoded(stored)
                    if stored.deleted:  # meanwhile
                        stored.shown = None
                    self._keep(stored)
            if modality is None:
                return shown
            known = declared_modality(modality, shown.modality, stored.path)
            return shown if known == shown.modality else dataclasses.replace(shown, modality=known)
        except UnavailableError as error:
            raise UnavailableError(self._store.without_paths(str(error))) from None
        except UserError as error:
            raise bad_request(self._store.without_paths(str(error)), code="unusable_file") from None

    def _decoded(self, stored: StoredFile) -> Volume | LoadedImage:
        path, is_volume = file_to_read(as_path(stored.path), None)
        if is_volume:
            return self._decoder.read_volume(path)
        return self._decoder.load_image(path, alpha=self._preprocessing.alpha)

    def _keep(self, stored: StoredFile) -> None:
        """Forgets the volumes that were read first, and those of deleted files."""
        self._recent[stored.id] = stored
        for name in [name for name, one in self._recent.items() if one.shown is None]:
            del self._recent[name]
        while len(self._recent) > 1 and sum(map(_size, self._recent.values())) > self._max_bytes:
            self._recent.popitem(last=False)[1].shown = None


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray, *, packed: bool = False) -> bytes:
    """A NIfTI file of [X, Y, Z] voxels in millimetres, gzipped if `packed`."""
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    return gzip.compress(data, 6, mtime=0) if packed else data


def _size(stored: StoredFile) -> int:
    shown = stored.shown
    if shown is None:
        return 0
    if isinstance(shown, LoadedImage):
        return shown.pixels.nbytes
    return shown.voxels.nbytes + (0 if shown.valid is None else shown.valid.nbytes)


def _plane_size(volume: Volume, axis: int) -> dict[str, Any]:
    """Slices along an axis, and the size of one in pixels and millimetres."""
    across, down = (other for other in range(3) if other != axis)
    width, height = volume.voxels.shape[across], volume.voxels.shape[down]
    spacing = volume.spacing
    return {
        "slices": volume.voxels.shape[axis],
        "width": width,
        "height": height,
        "width_mm": round(float(width * spacing[across]), 3),
        "height_mm": round(float(height * spacing[down]), 3),
    }


def _full_range(volume: Volume) -> Window:
    """The window from the smallest to the largest value."""
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    return (low + high) / 2, (high - low) or 1.0


def _chosen(volume: Volume, window: Window | str) -> Window | None:
    if not isinstance(window, str):
        return window
    if window == MODEL:
        return None
    if window == MIN_MAX:
        return _full_range(volume)
    if volume.modality not in ("CT", UNKNOWN):
        raise bad_request(f"window: {window} is for CT, and this is {volume.modality}; use minmax", "window")
    return CT_PRESETS[window]
