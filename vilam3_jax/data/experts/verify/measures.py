"""Measurements of one label in patient space, for the checks of a result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import cast

import numpy as np
from scipy import ndimage

from vilam3_jax.data.experts.record import Segment

_NEIGHBOURS = np.ones((3, 3, 3), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelMeasures:
    """Measurements of one label, computed on first use inside the label's bounding box.

    Sums proceed plane by plane: a float64 copy of a lung, half of a scan, would take twice the scan's memory.

    Attributes:
      segment: the label.
      labels: label map, integers [X, Y, Z].
      affine: [4, 4], voxel index to RAS millimetres.
      voxels: the scan, [X, Y, Z], or None.
    """

    segment: Segment
    labels: np.ndarray
    affine: np.ndarray
    voxels: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Name of the label."""
        return self.segment.name

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """Bounding box in voxels."""
        b = self.segment.bbox
        return slice(b[0], b[3]), slice(b[1], b[4]), slice(b[2], b[5])

    def _planes(self) -> Iterator[tuple[int, np.ndarray]]:
        """(index along axis 2, mask of the box in that plane, bool)."""
        x, y, z = self.box
        for plane in range(z.start, z.stop):
            yield plane, self.labels[x, y, plane] == self.segment.label_id

    @functools.cached_property
    def centroid_mm(self) -> np.ndarray:
        """Centroid, RAS millimetres, float64 [3]."""
        x, y, _ = self.box
        columns, rows = np.arange(x.start, x.stop), np.arange(y.start, y.stop)
        total = np.zeros(3)
        for plane, mask in self._planes():
            count = np.count_nonzero(mask)
            total += mask.sum(axis=1) @ columns, mask.sum(axis=0) @ rows, count * plane
        return self.affine[:3, :3] @ (total / self.segment.voxels) + self.affine[:3, 3]

    @functools.cached_property
    def main_part(self) -> float:
        """Share of the voxels in the largest 26-connected component."""
        if self.segment.components == 1:
            return 1.0
        mask = self.labels[self.box] == self.segment.label_id
        parts, _ = cast(tuple[np.ndarray, int], ndimage.label(mask, _NEIGHBOURS))
        return float(np.bincount(parts.ravel())[1:].max()) / self.segment.voxels

    @functools.cached_property
    def mean_and_deviation(self) -> tuple[float, float]:
        """Mean and standard deviation of the voxel values."""
        total = squares = 0.0
        for inside in self._inside():
            values = inside.astype(np.float64)
            total, squares = total + values.sum(), squares + (values @ values)
        mean = total / self.segment.voxels
        return float(mean), float(np.sqrt(max(0.0, squares / self.segment.voxels - mean**2)))

    def _inside(self) -> Iterator[np.ndarray]:
        """Voxel values inside the label, plane by plane."""
        assert self.voxels is not None
        x, y, _ = self.box
        return (self.voxels[x, y, plane][mask] for plane, mask in self._planes())

    def share_above(self, threshold: float) -> float:
        """Share of the voxels whose value exceeds `threshold`."""
        above = sum(np.count_nonzero(values > threshold) for values in self._inside())
        return above / self.segment.voxels

    def reaches_border(self, valid: np.ndarray | None) -> bool:
        """Whether the label touches the border of the scan or invalid voxels.

        Args:
          valid: bool [X, Y, Z], False where the scan has no measurement; None if it has one everywhere.
        """
        low, high = self.segment.bbox[:3], self.segment.bbox[3:]
        if min(low) == 0 or any(h == n for h, n in zip(high, self.labels.shape, strict=True)):
            return True
        if valid is None:
            return False
        wider = tuple(slice(s.start - 1, s.stop + 1) for s in self.box)  # within the scan, see above
        if valid[wider].all():
            return False
        mask = self.labels[wider] == self.segment.label_id
        return bool((ndimage.binary_dilation(mask, _NEIGHBOURS) & ~valid[wider]).any())
