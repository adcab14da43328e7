"""DICOM pixels: decoded and rescaled values, and pictures as they are meant to be seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pydicom

from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.paths import PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class DicomPicture:
    """One frame as it is meant to be seen.

    Attributes:
      pixels: uint8, [H, W] grey or [H, W, 3] RGB.
      modality: DICOM's code as the file states it, or "unknown".
      body_part: as the file states it, upper case, or "unknown".
      frame: which frame this is, from 0.
      frames: how many the file holds.
      notes: what was assumed, chosen or skipped; no patient data.
    """

    pixels: np.ndarray
    modality: str
    body_part: str
    frame: int
    frames: int
    notes: tuple[str, ...] = ()


def frame_values(
    dataset: pydicom.Dataset, frame: int, path: PathLike, *, limits: Limits = DEFAULT_LIMITS
) -> tuple[np.ndarray, np.ndarray | None]:
    """Values of one frame, [rows, columns], and where they are valid, bool or None (everywhere)."""
    raise NotImplementedError


def read_picture(
    path: PathLike, *, frame: int | None = None, voi: int = 0, limits: Limits = DEFAULT_LIMITS
) -> DicomPicture:
    """Reads one frame of a DICOM file as a picture."""
    raise NotImplementedError
