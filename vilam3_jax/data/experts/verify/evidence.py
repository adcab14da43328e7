"""Evidence of the modality and the body region of an input.

Statements of the file or the caller take precedence. Voxel values and the size of the body count only without
a statement, and only against a modality or region: they can rule one out but never confirm it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from vilam3_jax.data.experts.cards import all_facts
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volumes import Volume

Values = Literal["hounsfield", "not hounsfield", "unclear"]

# DICOM codes that state how a file was made, not by which device.
_NO_MODALITY = ("", UNKNOWN, "OT", "SC", "DOC")
_SAMPLED = 1_000_000  # voxels in statistics
_AIR_HU = (-1100.0, -850.0)
_SOFT_TISSUE_HU = (-150.0, 150.0)
_BODY_HU = -300.0  # lower bound of tissue other than lung
_MIN_AIR, _MIN_TISSUE = 0.02, 0.02  # minimum shares of the voxels of a CT
_FOREIGN_TISSUE = 0.02  # minimum share of soft tissue among the bright voxels of a CT
_LOWEST_WITHOUT_AIR = -200.0
# Axial sections measure about 250 cm² in an adult's head, 340 in a very large one, 450 to 1000 in the trunk.
_NO_HEAD_CM2 = 400.0
_EMPTY_CM2 = 20.0
_CUT_BODY = 0.05  # share of tissue in an outermost sagittal plane above which the scan cuts off the body
_SMALL_SECTIONS = 0.1  # minimum share of the head among a scan's sections


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """The evidence of one input."""

    role: str = ""  # "" for a single input
    modality: str = UNKNOWN  # stated DICOM code
    body_part: str = UNKNOWN  # stated body part
    volume: Volume | None = None  # None for a 2-D image, whose pixels are no evidence

    @classmethod
    def of(
        cls, role: str, data: Volume | np.ndarray, modality: str = UNKNOWN, body_part: str = UNKNOWN
    ) -> Evidence:
        """Uses a volume's own statements; for a 2-D image, uint8 [H, W, 3], those of the caller."""
        if isinstance(data, Volume):
            return cls(role, data.modality, data.body_part, data)
        return cls(role, modality, body_part)

    @property
    def stated_modality(self) -> str | None:
        """DICOM code, None if no device is stated."""
        return None if self.modality in _NO_MODALITY else self.modality

    @property
    def stated_regions(self) -> frozenset[str]:
        """Regions of the stated body part; empty if unknown."""
        part = "".join(c for c in self.body_part if c.isalpha())
        return frozenset(all_facts()["body_parts"].get(part, ()))

    @functools.cached_property
    def values(self) -> Values:
        """Whether the values look like Hounsfield units."""
        return values_of(self.volume) if self.volume is not None else "unclear"

    @functools.cached_property
    def is_hounsfield(self) -> bool:
        """Whether the values may be assumed to be Hounsfield units."""
        if self.volume is None or self.values == "not hounsfield":
            return False
        return "HU" in self.volume.units or self.stated_modality == "CT" or self.values == "hounsfield"

    @functools.cached_property
    def smallest_section_cm2(self) -> float | None:
        """The tenth percentile of the body's area over non-empty axial planes; None without a body."""
        if self.volume is None:
            return None
        areas = section_areas(self.volume, hounsfield=self.is_hounsfield)
        areas = areas[areas > _EMPTY_CM2]
        return float(np.quantile(areas, _SMALL_SECTIONS)) if areas.size else None

    @property
    def exceeds_head(self) -> bool:
        """Whether the whole scan is too wide for a head, unlike a whole-body scan."""
        smallest = self.smallest_section_cm2
        return smallest is not None and smallest > _NO_HEAD_CM2


def _sampled(volume: Volume) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """(voxels, valid) subsampled along each axis, and the three strides."""
    step = max(1, int(np.ceil((volume.voxels.size / _SAMPLED) ** (1 / 3))))
    steps = tuple(min(step, max(1, n // 8)) for n in volume.voxels.shape)
    cut = tuple(slice(None, None, n) for n in steps)
    voxels = volume.voxels[cut]
    valid = np.ones(voxels.shape, bool) if volume.valid is None else volume.valid[cut]
    return voxels, valid, (steps[0], steps[1], steps[2])


def values_of(volume: Volume) -> Values:
    """Whether values can be Hounsfield units.

    `hounsfield`: both air at -1000 and soft tissue at 0 are present, as in no other modality.
    `not hounsfield`: no value is as low as air, and hardly any bright voxel is in the range of soft tissue.
    This includes a CT stored without its offset of -1024.
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
    """The value above which a voxel shows tissue: -300 HU for a CT, else a fifth of the brightest values."""
    if hounsfield:
        return _BODY_HU
    voxels, valid, _ = _sampled(volume)
    values = voxels[valid]
    return 0.2 * float(np.quantile(values, 0.99)) if values.size else 0.0


def body_centre(volume: Volume, planes: slice, threshold: float) -> np.ndarray | None:
    """The centroid of the tissue above `threshold` in `planes` of axis 2, RAS millimetres, float64 [3].

    None if the scan cuts off the right or left side of the body, whose middle is then unknown.
    """
    _, _, steps = _sampled(volume)
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
    """Area of tissue in each sampled plane along axis 2, cm²; float64 [planes]."""
    threshold = body_threshold(volume, hounsfield=hounsfield)
    voxels, valid, steps = _sampled(volume)
    tissue = (voxels > threshold) & valid
    first, second = volume.affine[:3, 0] * steps[0], volume.affine[:3, 1] * steps[1]
    cell_mm2 = float(np.linalg.norm(np.cross(first, second)))
    return tissue.sum(axis=(0, 1)) * cell_mm2 / 100.0
