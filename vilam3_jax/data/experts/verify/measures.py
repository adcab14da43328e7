"""One label of a label map, measured in the patient's space: what the checks of a result ask for."""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import numpy as np
from scipy import ndimage

from vilam3_jax.data.experts.record import Segment

_NEIGHBOURS = np.ones((3, 3, 3), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelMeasures:
    """Figures of one label; each is computed when it is first asked for, inside the label's box alone.

    Attributes:
      segment: its counts, see `Segment`.
      labels: the label map, integers [X, Y, Z].
      affine: [4, 4], voxel index to RAS millimetres.
      voxels: the scan, [X, Y, Z], or None.
    """

    segment: Segment
    labels: np.ndarray
    affine: np.ndarray
    voxels: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Of the label."""
        return self.segment.name

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """Where it lies, in voxels."""
        b = self.segment.bbox
        return slice(b[0], b[3]), slice(b[1], b[4]), slice(b[2], b[5])

    @property
    def mask(self) -> np.ndarray:
        """bool, of the size of the box."""
        return self.labels[self.box] == self.segment.label_id

    @functools.cached_property
    def centroid_mm(self) -> np.ndarray:
        """The mean position, RAS millimetres, float64 [3]."""
        mask = self.mask
        index = []
        for axis, start in enumerate(self.segment.bbox[:3]):
            others = tuple(a for a in range(3) if a != axis)
            counts = mask.sum(axis=others, dtype=np.int64)
            index.append(start + float(counts @ np.arange(counts.size)) / float(counts.sum()))
        return self.affine[:3, :3] @ np.array(index) + self.affine[:3, 3]

    @functools.cached_property
    def box_mm(self) -> np.ndarray:
        """Lowest and highest RAS coordinates of the box's outer corners, float64 [2, 3]."""
        b = self.segment.bbox
        corners = (
            np.array([[x, y, z] for x in (b[0], b[3]) for y in (b[1], b[4]) for z in (b[2], b[5])]) - 0.5
        )
        placed = corners @ self.affine[:3, :3].T + self.affine[:3, 3]
        return np.stack([placed.min(axis=0), placed.max(axis=0)])

    @functools.cached_property
    def main_part(self) -> float:
        """The share of its voxels that the largest 26-connected part has."""
        if self.segment.components == 1:
            return 1.0
        parts, _ = cast(tuple[np.ndarray, int], ndimage.label(self.mask, _NEIGHBOURS))
        return float(np.bincount(parts.ravel())[1:].max()) / self.segment.voxels

    @functools.cached_property
    def _values(self) -> tuple[float, float]:
        assert self.voxels is not None
        inside = self.voxels[self.box][self.mask].astype(np.float64)
        return float(inside.mean()), float(inside.std())

    @property
    def mean(self) -> float:
        """Of the scan's values inside."""
        return self._values[0]

    @property
    def deviation(self) -> float:
        """Standard deviation of the scan's values inside."""
        return self._values[1]

    def share_above(self, threshold: float) -> float:
        """The share of its voxels where the scan is brighter than `threshold`."""
        assert self.voxels is not None
        return float((self.voxels[self.box][self.mask] > threshold).mean())

    def reaches_border(self, valid: np.ndarray | None) -> bool:
        """Whether it touches the end of the scan, or voxels that measure nothing.

        Args:
          valid: bool [X, Y, Z], False where the scan measured nothing; None: it did everywhere.
        """
        low, high = self.segment.bbox[:3], self.segment.bbox[3:]
        if min(low) == 0 or any(h == n for h, n in zip(high, self.labels.shape, strict=True)):
            return True
        if valid is None:
            return False
        wider = tuple(slice(s.start - 1, s.stop + 1) for s in self.box)  # the box ends inside, see above
        if valid[wider].all():
            return False
        mask = self.labels[wider] == self.segment.label_id
        return bool((ndimage.binary_dilation(mask, _NEIGHBOURS) & ~valid[wider]).any())
