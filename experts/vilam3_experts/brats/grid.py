"""Aligns four sequences on one grid, and checks that they show the same place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from nibabel.affines import voxel_sizes

from vilam3_experts.base import ExpertFailure
from vilam3_experts.monai_volumes import resample_linear, spacing_grid, to_metatensor
from vilam3_experts.orientation import to_canonical
from vilam3_jax.data.experts.record import Verdict
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.volumes import GRID_TOLERANCE, Volume, grid_distance

_SAME_SPACING = 1e-3  # mm
_NEAR_ZERO = 1e-6  # of the largest value
_MIN_VOXELS = 16  # along an axis; the network halves three times
_MIN_COVERED = 0.5  # of the head in the reference
_NOTED_COVERED = 0.98
_THICK = 3.0  # mm; thicker slices have no three-dimensional detail
_MIN_DICE = 0.6  # of the heads
_HEAD = 0.1  # of the range between the percentiles, above the darkest
_HEAD_PERCENTILES = (1.0, 99.0)
_STRIPPED = 0.3  # share of zeros; a head with skull and air has hardly one voxel of exactly 0


@dataclasses.dataclass(frozen=True, eq=False)
class AlignedScans:
    """Sequences on the network's grid, and the way back.

    `images` are float32 [I, J, K] in the index order `axcodes`, with the float64 [4, 4] `affine` to RAS
    millimetres. The result must be on the grid of `reference`.
    """

    images: dict[str, torch.Tensor]
    affine: torch.Tensor
    reference: MetaTensor
    axcodes: str
    verdicts: tuple[Verdict, ...]

    def to_reference(self, image: torch.Tensor) -> np.ndarray:
        """Resamples float32 [I, J, K] linearly to the grid of the reference, in RAS order."""
        shape = tuple(int(n) for n in self.reference.shape[1:])
        assert len(shape) == 3
        back = resample_linear(MetaTensor(image[None], affine=self.affine), self.reference.affine, shape)
        return to_canonical(back.as_tensor()[0].numpy(), self.axcodes)


def align(volumes: Mapping[str, Volume], axcodes: str, pixdim: Sequence[float]) -> AlignedScans:
    """Brings sequences to the grid of the first one, with the spacing `pixdim` (mm) and order `axcodes`.

    Scans on that grid are used unchanged. Others are resampled once, linearly, with 0 (the network's
    background) outside their field of view. Raises `ExpertFailure` if the scans show different places, or the
    grid is too large or too small.
    """
    turned = {role: dataclasses.replace(v, stored_orientation=axcodes) for role, v in volumes.items()}
    first, reference_volume = next(iter(turned.items()))
    reference = _tensor(reference_volume)
    shape, affine = _target(reference, pixdim)
    if min(shape) < _MIN_VOXELS:
        raise ExpertFailure(
            f"{first} covers {_product(shape)} voxels of {_product(pixdim)} mm, which hold no head; "
            "give a three-dimensional scan"
        )
    verdicts = _spacing_verdicts(reference, first, shape)
    images = {}
    for role, volume in turned.items():
        image = reference if role == first else _tensor(volume)
        distance = np.inf
        if volume.voxels.shape == reference_volume.voxels.shape:
            distance = grid_distance(volume.affine, reference_volume)
        if distance <= GRID_TOLERANCE * reference_volume.spacing.min():
            image = MetaTensor(image.as_tensor(), affine=reference.affine)
            images[role] = resample_linear(image, affine, shape).as_tensor()[0]
            continue
        verdicts += _coverage_verdicts(role, first, _covered_share(reference, image))
        resampled = resample_linear(image, affine, shape).as_tensor()[0]
        # Rounding leaves near-zero values, and every non-zero voxel is standardised.
        near_zero = resampled.abs() < _NEAR_ZERO * resampled.abs().max()
        images[role] = resampled.masked_fill_(~_field_of_view(image, affine, shape) | near_zero, 0)
    verdicts += _registration_verdicts(images)
    verdicts += _background_verdicts(volumes)
    return AlignedScans(images, affine, reference, axcodes, tuple(verdicts))


def _tensor(volume: Volume) -> MetaTensor:
    """float32 [1, I, J, K]; invalid voxels become background."""
    voxels = volume.voxels.astype(np.float32)
    if volume.valid is not None:
        voxels[~volume.valid] = 0
    return to_metatensor(dataclasses.replace(volume, voxels=voxels))


def _target(reference: MetaTensor, pixdim: Sequence[float]) -> tuple[tuple[int, int, int], torch.Tensor]:
    if np.abs(voxel_sizes(np.asarray(reference.affine)) - pixdim).max() <= _SAME_SPACING:
        x, y, z = (int(n) for n in reference.shape[1:])
        return (x, y, z), torch.as_tensor(reference.affine, dtype=torch.float64)
    shape, affine = spacing_grid(reference, pixdim)
    if np.prod(shape, dtype=np.int64) > DEFAULT_LIMITS.voxels // 4:
        raise ExpertFailure(
            f"{_product(shape)} voxels of {_product(pixdim)} mm are more than the expert takes; "
            "crop the scans to the head"
        )
    return shape, affine


def _field_of_view(source: MetaTensor, affine: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Which voxels of a grid are in the field of view of `source`: bool [I, J, K]."""
    step = np.linalg.solve(np.asarray(source.affine, np.float64), np.asarray(affine, np.float64))
    i, j, k = (torch.arange(n, dtype=torch.float32) for n in shape)
    inside = torch.ones(tuple(shape), dtype=torch.bool)
    for (a, b, c, d), size in zip(step[:3].tolist(), source.shape[1:], strict=True):
        index = a * i[:, None, None] + b * j[:, None] + (c * k + d)
        inside &= (index >= -0.501) & (index <= size - 0.499)
    return inside


def _covered_share(reference: MetaTensor, image: MetaTensor) -> float:
    """The share of the head in `reference` that is in the field of view of `image`."""
    head = _head(reference.as_tensor()[0])
    inside = _field_of_view(image, torch.as_tensor(reference.affine), reference.shape[1:])
    return float((head & inside).sum() / max(1, int(head.sum())))


def _head(image: torch.Tensor) -> torch.Tensor:
    """A rough mask of the head; works without a skull and without a zero background."""
    low, high = np.percentile(image.numpy(), _HEAD_PERCENTILES)
    return image > low + _HEAD * (high - low)


def _spacing_verdicts(reference: MetaTensor, role: str, shape: Sequence[int]) -> list[Verdict]:
    spacing = voxel_sizes(np.asarray(reference.affine))
    found = []
    if tuple(shape) != tuple(reference.shape[1:]):
        message = (
            f"{role} has voxels of {_product(spacing)} mm; resampled for the network, and the result back"
        )
        found.append(Verdict("spacing", "pass", "before", role, message=message))
    if (thick := float(spacing.max())) > _THICK:
        message = f"{role} has slices {thick:.3g} mm apart; the network was trained on 1 mm"
        found.append(Verdict("spacing", "warn", "before", role, thick, high=_THICK, message=message))
    return found


def _coverage_verdicts(role: str, first: str, share: float) -> list[Verdict]:
    if share < _MIN_COVERED:
        raise ExpertFailure(
            f"{role} shows {share:.0%} of what {first} shows; the scans are not of one place, "
            "register them first"
        )
    status = "warn" if share < _NOTED_COVERED else "pass"
    message = f"{role} lies on another grid than {first} and was resampled; it shows {share:.0%} of the head"
    return [Verdict("grid", status, "before", role, share, low=_NOTED_COVERED, message=message)]


def _registration_verdicts(images: Mapping[str, torch.Tensor]) -> list[Verdict]:
    """Warns of unregistered scans, by the Dice of their heads with that of the reference."""
    (first, reference), *others = images.items()
    head = _head(reference)
    found = []
    for role, image in others:
        other = _head(image)
        dice = 2 * float((head & other).sum()) / max(1, int(head.sum()) + int(other.sum()))
        if dice < _MIN_DICE:
            message = (
                f"heads in {first} and {role} overlap with a Dice of {dice:.2f}; they may not be registered"
            )
            verdict = Verdict("registration", "warn", "before", role, dice, low=_MIN_DICE, message=message)
            found.append(verdict)
    return found


def _background_verdicts(volumes: Mapping[str, Volume]) -> list[Verdict]:
    """BraTS has skull-stripped heads on a zero background; the skull itself cannot be detected."""
    zeros = {role: float(np.mean(volume.voxels == 0)) for role, volume in volumes.items()}
    low = [role for role, share in zeros.items() if share < _STRIPPED]
    if not low:
        return []
    message = (
        f"the background of {', '.join(low)} is not 0; the network was trained on skull-stripped heads, "
        "whose background is"
    )
    return [Verdict("skull stripping", "unknown", "before", value=min(zeros.values()), message=message)]


def _product(lengths: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{length:.3g}" for length in lengths)
