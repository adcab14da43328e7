"""Conversion of scans to model input: windows, channels, planes; a section of the model config.

Training and inference share this module. A window depends on the modality stated by a file, a dataset or the
caller, never on voxel values; a volume without a stated modality is shown between percentiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from vilam3_jax.data.images import resize
from vilam3_jax.data.intensity import CT_WINDOWS, DISPLAY_PERCENTILES, window_to_uint8
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volumes import AXES, Volume, slice_2d
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import Section, from_mapping, setting

Window = tuple[float, float]
_CHANNELS = ("red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class Preprocessing(Section):
    """The `preprocessing` section of a model config.

    Attributes:
      ct_windows: (centre, width) in HU: one is shown as grey, three as red, green and blue; see
        `intensity.CT_WINDOWS` for presets.
      percentiles: percentiles of the whole volume that are shown as black and white, except for CT.
      alpha: handling of transparency, see `images.decode_image`.
      orientation: orientation of the volume before slicing; only RAS is implemented.
      plane: default plane at inference: axial, coronal or sagittal.
      slice: default slice in that plane; only "middle" is implemented.
      modalities: DICOM codes of the training data; empty: not stated, no check.
      spacing: smallest and largest voxel spacing in mm of the training volumes; empty: not stated. Slices are
        not resampled.
    """

    key = "model.preprocessing"
    ct_windows: tuple[Window, ...] = CT_WINDOWS["soft_tissue"]
    percentiles: tuple[float, float] = DISPLAY_PERCENTILES
    alpha: Literal["white", "ignore"] = setting(default="white", choices=("white", "ignore"))
    orientation: str = setting(default="RAS", choices=("RAS",))
    plane: str = setting(default="axial", choices=tuple(AXES))
    slice: str = setting(default="middle", choices=("middle",))
    modalities: tuple[str, ...] = ()
    spacing: tuple[float, ...] = ()

    def validate(self) -> None:
        windows, spacing = self.ct_windows, self.spacing
        pairs = isinstance(windows, tuple) and all(_numbers(window, 2) for window in windows)
        if not pairs or len(windows) not in (1, 3) or not all(width > 0 for _, width in windows):
            problem = "give one or three (centre, width > 0), such as ((50.0, 400.0),)"
            raise self.error("ct_windows", problem)
        if not _numbers(self.percentiles, 2) or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise self.error("percentiles", "give two rising numbers from 0 to 100")
        if not all(isinstance(code, str) and code.isupper() for code in self.modalities):
            raise self.error("modalities", "give DICOM's codes, such as ('CT', 'MR')")
        if spacing and not (_numbers(spacing, 2) and 0 < spacing[0] <= spacing[1]):
            raise self.error("spacing", "give the smallest and the largest in mm, or ()")

    @classmethod
    def of(cls, section: Any) -> Preprocessing:
        """Parses `config.model.preprocessing`; absent in older exports, which use the defaults.

        Raises `UserError` for an unknown key or an impossible value.
        """
        return from_mapping(cls, dict(section or {}))

    def windows(self, volume: Volume, window: Window | None = None) -> tuple[Window, ...]:
        """The windows for a volume: `window` if given, `ct_windows` for CT, () for percentiles."""
        if window is not None:
            return (window,)
        return self.ct_windows if volume.modality == "CT" else ()

    def slice_image(
        self, volume: Volume, axis: int, index: int, window: Window | None = None, size: int | None = None
    ) -> np.ndarray:
        """Converts one slice to an image: display orientation, windowed, resized without the aspect ratio.

        Args:
          volume: the scan.
          axis: see `volumes.slice_2d`.
          index: see `volumes.slice_2d`.
          window: (centre, width) in voxel units instead of the model's windows.
          size: side of the result in pixels; None: one pixel per voxel.

        Returns:
          [size, size, 3] uint8, or [h, w, 3]. Invalid voxels are black.

        Raises:
          UserError: `axis` or `index` outside the volume.
        """
        plane = slice_2d(volume.voxels, axis, index)
        windows = self.windows(volume, window)
        if windows:
            channels = [window_to_uint8(plane, shown) for shown in windows]
        else:
            channels = [window_to_uint8(plane, None, volume.percentile_limits(self.percentiles))]
        image = np.stack(channels * (3 // len(channels)), axis=-1)
        if volume.valid is not None:
            image[~slice_2d(volume.valid, axis, index)] = 0
        return image if size is None else resize(image, size)

    def describe(self, volume: Volume, window: Window | None = None) -> str:
        """The display range of a volume for messages, such as "window 50, 400"."""
        windows = self.windows(volume, window)
        texts = [f"{centre:g}, {width:g}" for centre, width in windows]
        if len(texts) == 1:
            return f"window {texts[0]}"
        if texts:
            return "windows " + "; ".join(
                f"{text} as {colour}" for text, colour in zip(texts, _CHANNELS, strict=True)
            )
        low, high = self.percentiles
        return f"between its {low:g} and {high:g} percentiles"

    def notes(self, modality: str, volume: Volume | None = None, window: Window | None = None) -> list[str]:
        """Caveats about the input for the reader of an answer; empty if it resembles the training data.

        Args:
          modality: modality of the image, as stated, or "unknown".
          volume: the scan, if the image is one of its slices.
          window: the window chosen by the caller, if any.
        """
        notes, known = [], ", ".join(self.modalities)
        if modality == UNKNOWN:
            if volume is not None and window is None:
                trained = f" This model was trained on {known}." if known else ""
                notes.append(
                    f"The file states no modality, so the volume is shown {self.describe(volume)}; state the "
                    f"modality if you know it.{trained}"
                )
        elif known and modality not in self.modalities:
            notes.append(f"The image is {modality}, but this model was trained on {known}.")
        if volume is not None and self.spacing:
            low, high = self.spacing
            if volume.spacing.min() < low or volume.spacing.max() > high:
                found = " x ".join(f"{value:.3g}" for value in volume.spacing)
                notes.append(
                    f"The voxel spacing is {found} mm, but the model was trained on {low:g} to {high:g} mm."
                )
        return notes


def preset_windows(name: str) -> tuple[Window, ...]:
    """The CT windows of a preset; raises `UserError` for an unknown one."""
    if name not in CT_WINDOWS:
        raise UserError(f"CT windows {name!r}: unknown; presets are {', '.join(sorted(CT_WINDOWS))}")
    return CT_WINDOWS[name]


def _numbers(values: Sequence[Any], count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


DEFAULT_PREPROCESSING = Preprocessing()
