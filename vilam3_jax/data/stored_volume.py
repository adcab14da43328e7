"""Results of the readers: a volume before `volumes` reorients it, and an image."""

from __future__ import annotations

import dataclasses

import numpy as np

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, eq=False)
class StoredVolume:
    """A decoded volume in the orientation of its file.

    Attributes:
      values: [I, J, K] numbers in file order, rescaled to `units`.
      affine: [4, 4] float64, index (i, j, k) to RAS millimetres.
      valid: [I, J, K] bool, False for padding instead of a measurement; None: all valid. Values that are not
        finite may be left valid.
      modality, body_part, units, window, notes: as in `volumes.Volume`.
    """

    values: np.ndarray
    affine: np.ndarray
    valid: np.ndarray | None = None
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    units: str = UNKNOWN
    window: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedImage:
    """An image as shown to the model, with the metadata of its file.

    Attributes:
      pixels: [H, W, 3] uint8; of `dicom.read_image` also [H, W].
      modality: the DICOM code in the file, or "unknown".
      body_part: as in the file, upper case, or "unknown".
      frame: index of this frame or page, from 0.
      frames: number of frames in the file.
      notes: sentences on what was assumed, repaired or skipped, without patient data.
    """

    pixels: np.ndarray
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    frame: int = 0
    frames: int = 1
    notes: tuple[str, ...] = ()
