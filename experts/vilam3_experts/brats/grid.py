"""Four sequences on one grid: whether they lie in the same place, and the voxels that the network sees."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor

from vilam3_experts.base import ExpertFailure
from vilam3_experts.monai_volumes import resample_linear, spacing_grid, to_canonical, to_metatensor
from vilam3_jax.data.experts.record import Verdict
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.volumes import Volume

_SAME_GRID = 0.1  # of a voxel
_SAME_SPACING = 1e-3  # mm
_NOTHING = 1e-6  # of the largest value
_LEAST_VOXELS = 16  # along an axis; the network halves three times
_LEAST_COVERED = 0.5  # of the head in the reference
_NOTED_COVERED = 0.98
_THICK = 3.0  # mm; thicker slices hold no three-dimensional detail
_LEAST_COMMON = 0.6  # Dice of the heads
_HEAD = 0.1  # above the darkest, of the range between the percentiles
_HEAD_PERCENTILES = (1.0, 99.0)
_STRIPPED = 0.3  # a head with skull and air around it has hardly one voxel of exactly 0


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """Sequences on the network's grid, and the way back.

    Attributes:
      images: role to float32 [I, J, K] on one grid, in the network's index order.
      affine: float64 [4, 4] of that grid, voxel index to RAS millimetres.
      reference: the scan whose grid the result must have, in the network's index order.
      volume: the same scan as it was given.
      verdicts: what was resampled or is doubtful.
    """

    images: dict[str, torch.Tensor]
    affine: torch.Tensor
    reference: MetaTensor
    volume: Volume
    verdicts: tuple[Verdict, ...]

    def to_reference(self, image: torch.Tensor) -> np.ndarray:
        """Brings float32 [I, J, K] back to the grid and order of `volume`, by linear interpolation."""
        shape = tuple(int(n) for n in self.reference.shape[1:])
        assert len(shape) == 3
        back = resample_linear(MetaTensor(image[None], affine=self.affine), self.reference.affine, shape)
        return to_canonical(back.as_tensor()[0].numpy(), self.volume)


def place(volumes: Mapping[str, Volume], axcodes: str, pixdim: Sequence[float]) -> Placed:
    """Puts sequences onto the grid of the first one, at the spacing `pixdim`.

    What lies on that grid is used as it is. Anything else is resampled once, linearly; outside of its field
    of view it is 0, which is the network's background.

    Args:
      volumes: role to scan; the first is the reference.
      axcodes: index order of the result, such as "LPS".
      pixdim: millimetres between voxels.

    Raises:
      ExpertFailure: scans that do not show the same place, or a grid that is too large or too small.
    """
    turned = {role: dataclasses.replace(v, stored_orientation=axcodes) for role, v in volumes.items()}
    first, reference_volume = next(iter(turned.items()))
    reference = _tensor(reference_volume)
    shape, affine = _target(reference, pixdim)
    if min(shape) < _LEAST_VOXELS:
        raise ExpertFailure(
            f"{first} covers {_product(shape)} voxels of {_product(pixdim)} mm, which hold no head; "
            "give a three-dimensional scan"
        )
    verdicts = _spacing_verdicts(reference, first, shape)
    images = {}
    for role, volume in turned.items():
        image = reference if role == first else _tensor(volume)
        if _same_grid(volume, reference_volume):
            image = MetaTensor(image.as_tensor(), affine=reference.affine)
            inside = None
        else:
            inside = _inside(image, affine, shape)
            verdicts += _coverage_verdicts(role, first, _covered(reference, image))
        placed = resample_linear(image, affine, shape).as_tensor()[0]
        images[role] = placed if inside is None else _with_background(placed, inside)
    verdicts += _registration_verdicts(images)
    verdicts += _background_verdicts(volumes)
    return Placed(images, affine, reference, reference_volume, tuple(verdicts))


def _tensor(volume: Volume) -> MetaTensor:
    """float32 [1, I, J, K]; voxels that measure nothing are background."""
    voxels = volume.voxels.astype(np.float32)
    if volume.valid is not None:
        voxels[~volume.valid] = 0
    return to_metatensor(dataclasses.replace(volume, voxels=voxels))


def _target(reference: MetaTensor, pixdim: Sequence[float]) -> tuple[tuple[int, int, int], torch.Tensor]:
    spacing = np.sqrt((np.asarray(reference.affine)[:3, :3] ** 2).sum(axis=0))
    if np.abs(spacing - pixdim).max() <= _SAME_SPACING:
        x, y, z = (int(n) for n in reference.shape[1:])
        return (x, y, z), torch.as_tensor(reference.affine, dtype=torch.float64)
    shape, affine = spacing_grid(reference, pixdim)
    if np.prod(shape, dtype=np.int64) > DEFAULT_LIMITS.voxels // 4:
        raise ExpertFailure(
            f"{_product(shape)} voxels of {_product(pixdim)} mm are more than the expert takes; "
            "crop the scans to the head"
        )
    return shape, affine


def _same_grid(volume: Volume, reference: Volume) -> bool:
    """Whether the corners of both lie within a tenth of a voxel."""
    if volume.voxels.shape != reference.voxels.shape:
        return False
    corners = np.array([[*corner, 1] for corner in itertools.product((0, 1), repeat=3)])
    distance = np.abs((corners * [*volume.voxels.shape, 1]) @ (volume.affine - reference.affine).T).max()
    return bool(distance <= _SAME_GRID * reference.spacing.min())


def _coordinates(source: MetaTensor, affine: torch.Tensor, shape: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yields the index along each axis of `source` of every voxel of a grid, float32 [I, J, K]."""
    step = np.linalg.solve(np.asarray(source.affine, np.float64), np.asarray(affine, np.float64))
    i, j, k = (torch.arange(n, dtype=torch.float32) for n in shape)
    for a, b, c, d in step[:3].tolist():
        yield a * i[:, None, None] + b * j[:, None] + (c * k + d)


def _inside(source: MetaTensor, affine: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Which voxels of a grid lie in the field of view of `source`: bool [I, J, K]."""
    inside = torch.ones(tuple(shape), dtype=torch.bool)
    for index, size in zip(_coordinates(source, affine, shape), source.shape[1:], strict=True):
        inside &= (index >= -0.501) & (index <= size - 0.499)
    return inside


def _with_background(image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """0 outside of the field of view, and where rounding left next to nothing: all but 0 is standardised."""
    nothing = image.abs() < _NOTHING * image.abs().max()
    return image.masked_fill_(~inside | nothing, 0)


def _covered(reference: MetaTensor, image: MetaTensor) -> float:
    """Which part of the head in `reference` lies in the field of view of `image`."""
    head = _head(reference.as_tensor()[0])
    inside = _inside(image, torch.as_tensor(reference.affine), reference.shape[1:])
    return float((head & inside).sum() / max(1, int(head.sum())))


def _head(image: torch.Tensor) -> torch.Tensor:
    """Roughly what is not air; needs no skull and no zero background."""
    low, high = np.percentile(image.numpy(), _HEAD_PERCENTILES)
    return image > low + _HEAD * (high - low)


def _spacing_verdicts(reference: MetaTensor, role: str, shape: Sequence[int]) -> list[Verdict]:
    spacing = np.sqrt((np.asarray(reference.affine)[:3, :3] ** 2).sum(axis=0))
    found = []
    if tuple(shape) != tuple(reference.shape[1:]):
        message = (
            f"{role} has voxels of {_product(spacing)} mm; resampled for the network, and the result back"
        )
        found.append(Verdict("spacing", "pass", "before", role, message=message))
    if spacing.max() > _THICK:
        message = f"{role} has slices {spacing.max():.3g} mm apart; the network was trained on 1 mm"
        found.append(
            Verdict("spacing", "warn", "before", role, float(spacing.max()), high=_THICK, message=message)
        )
    return found


def _coverage_verdicts(role: str, first: str, share: float) -> list[Verdict]:
    if share < _LEAST_COVERED:
        raise ExpertFailure(
            f"{role} shows {share:.0%} of what {first} shows; the scans are not of one place, "
            "register them first"
        )
    status = "warn" if share < _NOTED_COVERED else "pass"
    message = f"{role} lies on another grid than {first} and was resampled; it shows {share:.0%} of the head"
    return [Verdict("grid", status, "before", role, share, low=_NOTED_COVERED, message=message)]


def _registration_verdicts(images: Mapping[str, torch.Tensor]) -> list[Verdict]:
    """Whether the heads lie in one place: their Dice with the head of the reference."""
    (first, reference), *others = images.items()
    head = _head(reference)
    found = []
    for role, image in others:
        other = _head(image)
        dice = 2 * float((head & other).sum()) / max(1, int(head.sum()) + int(other.sum()))
        if dice < _LEAST_COMMON:
            message = (
                f"heads in {first} and {role} overlap with a Dice of {dice:.2f}; they may not be registered"
            )
            found.append(
                Verdict("registration", "warn", "before", role, dice, low=_LEAST_COMMON, message=message)
            )
    return found


def _background_verdicts(volumes: Mapping[str, Volume]) -> list[Verdict]:
    """BraTS has skull-stripped heads on a background of 0; whether a skull is there cannot be known."""
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
