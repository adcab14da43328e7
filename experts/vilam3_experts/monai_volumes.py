"""Conversion of `Volume` to MONAI's `MetaTensor`, and MONAI's resampling in slabs.

MONAI's `Spacing` computes in float64 over the whole scan: for 512 x 512 x 300 voxels about 1 GB forward and
2.5 GB for the inverse. The functions here return the same voxels from the same formulas, a slab at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import AFFINE_TOL, affine_to_spacing, compute_shape_offset, zoom_affine
from monai.networks.utils import to_norm_affine

from vilam3_experts.orientation import from_canonical
from vilam3_jax.data.volumes import Volume

_SLAB_POINTS = 1 << 17  # a slab's float64 coordinates take 3 MB, its neighbours and weights 20 more


def to_metatensor(volume: Volume) -> MetaTensor:
    """The scan as MONAI's readers return it: [1, I, J, K] in the index order of its file, usually a view.

    The order matters: resampled grids start at the first voxel, so another order has other sample points. The
    affine is float64 [4, 4], voxel index to RAS millimetres.
    """
    stored, affine = from_canonical(volume.voxels, volume.affine, volume.stored_orientation)
    if any(step < 0 for step in stored.strides):  # torch has no negative strides
        stored = np.ascontiguousarray(stored)
    return MetaTensor(torch.from_numpy(stored)[None], affine=torch.as_tensor(affine, dtype=torch.float64))


def spacing_grid(image: MetaTensor, pixdim: Sequence[float]) -> tuple[tuple[int, int, int], torch.Tensor]:
    """Shape and affine (float64 [4, 4]) of the grid that MONAI's `Spacing(pixdim)` resamples `image` to."""
    source = np.asarray(image.affine, np.float64)
    wanted = np.asarray(pixdim, np.float64).copy()
    present = affine_to_spacing(source, 3)
    near = np.abs(present - wanted) <= AFFINE_TOL
    wanted[near] = present[near]
    target = np.asarray(zoom_affine(source, wanted, diagonal=False))
    shape, offset = compute_shape_offset(cast(Sequence[int], image.shape[1:]), source, target)
    target[:3, 3] = offset
    size = cast(tuple[int, int, int], tuple(int(n) for n in shape))
    return size, torch.as_tensor(target, dtype=torch.float64)


class _Grid:
    """Source indices of the voxels of a target grid, computed as in `SpatialResample`."""

    def __init__(self, source: MetaTensor, target_affine: torch.Tensor, shape: tuple[int, int, int]) -> None:
        size = cast(tuple[int, int, int], tuple(source.shape[1:]))
        src = np.asarray(source.affine, np.float64)
        dst = np.asarray(target_affine, np.float64)
        self.size, self.shape = size, shape
        self.transform = torch.as_tensor(np.linalg.solve(src, dst), dtype=torch.float64)
        same = np.allclose(src, dst, atol=AFFINE_TOL) or np.allclose(
            self.transform.numpy(), np.eye(4), atol=AFFINE_TOL
        )
        self.unchanged = same and size == shape
        theta = to_norm_affine(self.transform[None], size, shape, align_corners=False)[0, :3]
        self._theta = theta[[2, 1, 0]][:, [2, 1, 0, 3]]  # torch names the last axis x

    def slabs(self) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Yields planes of the first target axis and, for each source axis, the clamped source index.

        Coordinates pass through the normalised range exactly as in `affine_grid` and `grid_sample`: where
        many points are halfway between two voxels, this rounding decides which voxel they take.
        """
        base = [
            torch.linspace(-1, 1, n, dtype=torch.float64) * (n - 1) / n if n > 1 else torch.zeros(1).double()
            for n in self.shape
        ]
        step = max(1, _SLAB_POINTS // max(1, self.shape[1] * self.shape[2]))
        for start in range(0, self.shape[0], step):
            planes = slice(start, min(start + step, self.shape[0]))
            size = (planes.stop - start, *self.shape[1:])
            points = torch.ones(*size, 4, dtype=torch.float64)
            points[..., 0] = base[2]
            points[..., 1] = base[1][:, None]
            points[..., 2] = base[0][planes, None, None]
            grid = points.view(1, -1, 4).bmm(self._theta.T[None]).view(*size, 3)
            indices = (((grid[..., 2 - axis] + 1) * n - 1) / 2 for axis, n in enumerate(self.size))
            yield planes, [index.clamp_(0, n - 1) for index, n in zip(indices, self.size, strict=True)]


def resample_linear(
    image: MetaTensor, target_affine: torch.Tensor, shape: tuple[int, int, int]
) -> MetaTensor:
    """MONAI's `SpatialResample(mode="bilinear", padding_mode="border", dtype=float64)`, in slabs.

    Takes [1, X, Y, Z] of any real dtype and a float64 [4, 4] affine; returns float32 [1, *shape] with MONAI's
    affine.
    """
    grid = _Grid(image, target_affine, shape)
    source = image.as_tensor()[0]
    if grid.unchanged:
        return MetaTensor(source[None].float(), affine=image.affine)
    out = torch.empty((1, *shape), dtype=torch.float32)
    for planes, index in grid.slabs():
        low = [i.floor() for i in index]
        rest = [i - f for i, f in zip(index, low, strict=True)]
        share = [[f + 1 - i for i, f in zip(index, low, strict=True)], rest]
        at = [
            [f.long() for f in low],
            [(f.long() + 1).clamp_(max=n - 1) for f, n in zip(low, grid.size, strict=True)],
        ]
        value = torch.zeros_like(rest[0])
        # The order of factors and terms of `grid_sample`: rounding decides on which side of 0 HU a voxel is.
        for x, y, z in itertools.product((0, 1), repeat=3):
            weight = share[z][2] * share[y][1] * share[x][0]
            value += source[at[x][0], at[y][1], at[z][2]].double() * weight
        out[0, planes] = value.float()
    return MetaTensor(out, affine=image.affine @ grid.transform)


def resample_nearest(
    labels: MetaTensor, target_affine: torch.Tensor, shape: tuple[int, int, int]
) -> torch.Tensor:
    """MONAI's `SpatialResample(mode="nearest", padding_mode="border", dtype=float64)`, in slabs.

    Takes and returns [1, X, Y, Z] of any dtype; `target_affine` is float64 [4, 4].
    """
    grid = _Grid(labels, target_affine, shape)
    source = labels.as_tensor()
    if grid.unchanged:
        return source
    out = torch.empty((1, *shape), dtype=source.dtype)
    for planes, index in grid.slabs():
        x, y, z = (i.round_().long() for i in index)
        out[0, planes] = source[0, x, y, z]
    return out
