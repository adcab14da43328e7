"""Evidence of the modality and the body region of an input.

What a file or a caller states comes first. Voxel values and the size of the body count only where nothing is
stated, and only against a modality or region: they never show what a scan is, but may show what it is not.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Literal

import numpy as np

from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volumes import Volume

Values = Literal["hounsfield", "not hounsfield", "unclear"]

# DICOM's codes that say how a file was made, not with which device.
_NO_MODALITY = ("", UNKNOWN, "OT", "SC", "DOC")
_SAMPLED = 1_000_000  # voxels that statistics are taken of
_AIR_HU = (-1100.0, -850.0)
_SOFT_TISSUE_HU = (-150.0, 150.0)
_BODY_HU = -300.0  # above it lies tissue, except lung
_MIN_AIR, _MIN_TISSUE = 0.02, 0.02  # shares of the voxels of a CT
_FOREIGN_TISSUE = 0.02  # of a CT's voxels that are not dark, more than this share is soft tissue
_LOWEST_WITHOUT_AIR = -200.0
# An adult's head has axial sections of about 250 cm², a very large one of 340; an adult's trunk 450 to 1000.
_NO_HEAD_CM2 = 400.0
_EMPTY_CM2 = 20.0
_CUT_BODY = 0.05  # of a scan's outermost sagittal plane, more tissue than this means that the body goes on
_SMALL_SECTIONS = 0.1  # a head would be at least this share of a scan's sections


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of one input.

    Attributes:
      role: its role, "" for a single input.
      modality: DICOM's code as it is stated, or "unknown".
      body_part: as it is stated, or "unknown".
      volume: the scan; None for a picture, whose values say nothing.
    """

    role: str = ""
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    volume: Volume | None = None

    @classmethod
    def of(cls, role: str, data: Volume | np.ndarray, modality: str = UNKNOWN, body_part: str = UNKNOWN):
        """Of a volume: what it states itself. Of a picture, uint8 [H, W, 3]: what the caller states."""
        if isinstance(data, Volume):
            return cls(role, data.modality, data.body_part, data)
        return cls(role, modality, body_part)

    @property
    def stated_modality(self) -> str | None:
        """DICOM's code, None where nothing states a device."""
        return None if self.modality in _NO_MODALITY else self.modality

    @property
    def stated_regions(self) -> frozenset[str]:
        """The regions that the stated body part belongs to; empty where that is not known."""
        return frozenset(_body_parts().get("".join(c for c in self.body_part if c.isalpha()), ()))

    @functools.cached_property
    def values(self) -> Values:
        """Whether the values look like Hounsfield units."""
        return values_of(self.volume) if self.volume is not None else "unclear"

    @functools.cached_property
    def is_hounsfield(self) -> bool:
        """Whether the values may be taken for Hounsfield units."""
        if self.volume is None or self.values == "not hounsfield":
            return False
        return "HU" in self.volume.units or self.stated_modality == "CT" or self.values == "hounsfield"

    @functools.cached_property
    def smallest_section_cm2(self) -> float | None:
        """The area of the body in the scan's smaller axial sections; None without a body.

        The tenth percentile over all planes that show anything.
        """
        if self.volume is None:
            return None
        areas = section_areas(self.volume, hounsfield=self.is_hounsfield)
        areas = areas[areas > _EMPTY_CM2]
        return float(np.quantile(areas, _SMALL_SECTIONS)) if areas.size else None

    @property
    def is_no_head(self) -> bool:
        """Whether every part of the scan is too wide for a head; whole-body scans are not."""
        smallest = self.smallest_section_cm2
        return smallest is not None and smallest > _NO_HEAD_CM2


@functools.cache
def _body_parts() -> dict[str, list[str]]:
    table = importlib.resources.files("vilam3_jax.data.experts") / "tables" / "facts.json"
    return json.loads(table.read_text(encoding="utf-8"))["body_parts"]


def _sampled(volume: Volume) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """(voxels, valid) on every n-th index along each axis, and the three n."""
    step = max(1, int(np.ceil((volume.voxels.size / _SAMPLED) ** (1 / 3))))
    steps = tuple(min(step, max(1, n // 8)) for n in volume.voxels.shape)
    cut = tuple(slice(None, None, n) for n in steps)
    voxels = volume.voxels[cut]
    valid = np.ones(voxels.shape, bool) if volume.valid is None else volume.valid[cut]
    return voxels, valid, (steps[0], steps[1], steps[2])


def values_of(volume: Volume) -> Values:
    """Whether values can be Hounsfield units.

    `hounsfield`: air at -1000 and soft tissue at 0 are both there, which no other modality shows.
    `not hounsfield`: nothing is as dark as air, and of what is not dark nearly nothing lies where soft
    tissue would. A CT that is stored without its offset of -1024 is such a scan, too.
    """
    voxels, valid, _ = _sampled(volume)
    values = voxels[valid].astype(np.float32)
    if not values.size:
        return "unclear"
    low, high = _SOFT_TISSUE_HU
    tissue = (values >= low) & (values <= high)
    air = (values >= _AIR_HU[0]) & (values <= _AIR_HU[1])
    if air.mean() >= _MIN_AIR and tissue.mean() >= _MIN_TISSUE:
        return "hounsfield"
    bright = values > 0.1 * np.quantile(values, 0.99)
    if values.min() > _LOWEST_WITHOUT_AIR and bright.any() and tissue[bright].mean() < _FOREIGN_TISSUE:
        return "not hounsfield"
    return "unclear"


def body_threshold(volume: Volume, *, hounsfield: bool) -> float:
    """The value above which a voxel shows tissue: a CT's at -300 HU, otherwise a fifth of the brightest."""
    if hounsfield:
        return _BODY_HU
    voxels, valid, _ = _sampled(volume)
    values = voxels[valid]
    return 0.2 * float(np.quantile(values, 0.99)) if values.size else 0.0


def body_centre(volume: Volume, planes: slice, *, hounsfield: bool) -> np.ndarray | None:
    """The centroid of the tissue in some planes, RAS millimetres, float64 [3].

    None where the body has no end on its right or left: its middle is not that of what the scan shows.

    Args:
      planes: along axis 2.
      hounsfield: see `body_threshold`.
    """
    _, _, steps = _sampled(volume)
    threshold = body_threshold(volume, hounsfield=hounsfield)
    part = volume.voxels[:: steps[0], :: steps[1], planes][..., :: steps[2]]
    tissue = part > threshold
    cut = max(tissue[0].mean(), tissue[-1].mean())
    if not tissue.any() or cut > _CUT_BODY:
        return None
    index = [
        float(tissue.sum(axis=others, dtype=np.int64) @ np.arange(0, n, step)) / np.count_nonzero(tissue)
        for others, n, step in zip(((1, 2), (0, 2)), volume.voxels.shape, steps, strict=False)
    ]
    middle = np.array([*index, (planes.start + planes.stop - 1) / 2])
    return volume.affine[:3, :3] @ middle + volume.affine[:3, 3]


def section_areas(volume: Volume, *, hounsfield: bool) -> np.ndarray:
    """The area of tissue in each sampled plane along axis 2, cm²; float64 [planes]."""
    threshold = body_threshold(volume, hounsfield=hounsfield)
    voxels, valid, steps = _sampled(volume)
    tissue = (voxels > threshold) & valid
    first, second = volume.affine[:3, 0] * steps[0], volume.affine[:3, 1] * steps[1]
    cell_mm2 = float(np.linalg.norm(np.cross(first, second)))
    return tissue.sum(axis=(0, 1)) * cell_mm2 / 100.0
