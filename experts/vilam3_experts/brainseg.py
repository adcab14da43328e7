"""Brain mask of a T1-weighted head scan, by the two TorchScript networks of the deepbet package.

Pre- and post-processing reimplement deepbet 1.0.2 (MIT). Intensities are clipped to the 0.5 and 99.5
percentiles and standardised to mean 0.449 and standard deviation 0.226. The first network locates the brain
on a 128^3 grid; the second masks its bounding box, with a 10 % margin, on a 256^3 grid. Sampling is nearest
neighbour in both directions.
"""

from __future__ import annotations

import io
from typing import cast

import numpy as np
import torch
from scipy import ndimage

from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.weights import Weights
from vilam3_jax.data.volumes import Volume

_COARSE = (128, 128, 128)
_FINE = (256, 256, 256)
_MARGIN = 0.1
_MIN_SHARE = 0.02  # of brain in a plane of the bounding box
_NEIGHBOURS = np.ones((3, 3, 3), bool)


class BrainSeg:
    """The two networks, on the GPU if torch finds one."""

    def __init__(self, weights: Weights) -> None:
        """Loads the networks from the verified bytes `bbox` and `model`."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bbox, self._model = (
            torch.jit.load(io.BytesIO(weights.files[name]), map_location=self._device).eval()
            for name in ("bbox", "model")
        )

    def run(self, data: Volume, args: str) -> Output:
        """Returns one label, `brain`; raises `ExpertFailure` if no brain is found."""
        del args  # the card has none
        voxels = data.voxels.astype(np.float32)
        coarse = resample_nearest(voxels, _COARSE)
        low, high = np.quantile(coarse, [0.005, 0.995])
        if not high > low:
            raise ExpertFailure("the volume has no contrast")
        found = self._probability(self._bbox, standardise(coarse, low, high)) > 0.5
        if not found.any():
            raise ExpertFailure("no brain found")
        box = brain_box(largest_component(found), voxels.shape)
        crop = voxels[box]
        fine = self._probability(self._model, standardise(resample_nearest(crop, _FINE), low, high))
        mask = resample_nearest(fine, crop.shape) > 0.5
        if not mask.any():
            raise ExpertFailure("no brain found")
        labels = np.zeros(voxels.shape, np.uint8)
        labels[box] = cast(np.ndarray, ndimage.binary_fill_holes(largest_component(mask)))
        return Output(labels=labels, label_names={1: "brain"})

    def _probability(self, network: torch.jit.ScriptModule, values: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            batch = torch.from_numpy(values)[None, None].to(self._device)
            return network(batch)[0, 1].float().cpu().numpy()


def resample_nearest(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resamples [X, Y, Z] to `shape`, nearest neighbour, voxel centres aligned (torch `nearest-exact`)."""
    picks = [
        np.minimum(((np.arange(n) + 0.5) * (m / n)).astype(int), m - 1)
        for n, m in zip(shape, values.shape, strict=True)
    ]
    return values[np.ix_(*picks)]


def standardise(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clips to [low, high], standardises to mean 0.449 and standard deviation 0.226; float32, same shape."""
    scaled = np.clip((values - low) / (high - low), 0.0, 1.0)
    deviation = float(scaled.std(ddof=1))
    if deviation == 0:
        raise ExpertFailure("the volume has no contrast")
    return ((scaled - scaled.mean()) / deviation * 0.226 + 0.449).astype(np.float32)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 26-connected component of a non-empty mask."""
    labels, _ = cast(tuple[np.ndarray, int], ndimage.label(mask, _NEIGHBOURS))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def brain_box(mask: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Bounding box of a coarse mask on the grid `shape`, with a margin on each side."""
    box = []
    for axis, size in enumerate(shape):
        share = mask.mean(axis=tuple(a for a in range(3) if a != axis))
        planes = np.flatnonzero(share > _MIN_SHARE)
        if not planes.size:
            raise ExpertFailure("too little brain found for a bounding box")
        scale = size / mask.shape[axis]
        first, last = planes[0] * scale, (planes[-1] + 1) * scale
        centre = np.round((first + last) / 2)
        extent = np.round((last - first) * (1 + 2 * _MARGIN))
        start, stop = max(0, int(centre - extent / 2)), min(size, int(centre + extent / 2))
        box.append(slice(start, max(stop, start + 1)))
    return tuple(box)
