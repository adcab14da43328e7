"""VISTA3D's pre-processing and its inverse, with MONAI's transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.croppad.array import CropForeground
from monai.transforms.intensity.array import ScaleIntensityRange
from monai.transforms.spatial.array import Orientation

from vilam3_experts import monai_volumes
from vilam3_experts.base import ExpertFailure
from vilam3_experts.orientation import to_canonical
from vilam3_experts.vista3d.bundle import CropStep, OrientationStep, SpacingStep, Step
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.volumes import Volume

Undo = Callable[[MetaTensor], MetaTensor]


class PreprocessedScan:
    """A scan after pre-processing, and the inverse for its labels.

    Attributes:
      image: float32 [1, X, Y, Z].
    """

    def __init__(self, volume: Volume, steps: Sequence[Step]) -> None:
        """Applies `steps`; raises `ExpertFailure` if the scan becomes empty or too large."""
        self._axcodes = volume.stored_orientation
        self._undo: list[Undo] = []
        image = monai_volumes.to_metatensor(volume)
        for step in steps:
            image, undo = _apply(step, image)
            if undo is not None:
                self._undo.append(undo)
        self.image = image

    def to_input(self, labels: torch.Tensor) -> np.ndarray:
        """Resamples labels [X, Y, Z] from the grid of `image` to that of the volume, nearest neighbour.

        Voxels outside the crop are 0.
        """
        # `MetaTensor` keeps uint8 through flips, padding and indexing; nothing here interpolates.
        back = MetaTensor(
            labels[None],
            affine=self.image.affine,
            applied_operations=copy.deepcopy(self.image.applied_operations),
        )
        for undo in reversed(self._undo):
            back = undo(back)
        return to_canonical(back.as_tensor()[0].numpy(), self._axcodes)


def _apply(step: Step, image: MetaTensor) -> tuple[MetaTensor, Undo | None]:
    if isinstance(step, SpacingStep):
        return _respace(step, image)
    if isinstance(step, CropStep):
        # Checked here, because MONAI reports an empty box as a padding error.
        if not bool((image > 0).any()):
            raise ExpertFailure("no voxel is above 0 HU: there is no body in this volume, or it is not in HU")
        transform = CropForeground(margin=step.margin, allow_smaller=step.allow_smaller)
    elif isinstance(step, OrientationStep):
        transform = Orientation(axcodes=step.axcodes, labels=None)
    else:
        scale = ScaleIntensityRange(step.a_min, step.a_max, step.b_min, step.b_max, step.clip)
        return cast(MetaTensor, scale(image)), None
    return cast(MetaTensor, transform(image)), cast(Undo, transform.inverse)


def _respace(step: SpacingStep, image: MetaTensor) -> tuple[MetaTensor, Undo]:
    shape, affine = monai_volumes.spacing_grid(image, step.pixdim)
    voxels = int(np.prod(shape, dtype=np.float64))
    if voxels > DEFAULT_LIMITS.voxels:
        raise ExpertFailure(
            f"{'x'.join(map(str, shape))} voxels at the spacing of the network, "
            f"more than {DEFAULT_LIMITS.voxels}; crop the scan"
        )
    before = image.affine
    size = cast(tuple[int, int, int], tuple(image.shape[1:]))
    resampled = monai_volumes.resample_linear(image, affine, shape)
    resampled.applied_operations = image.applied_operations

    def undo(labels: MetaTensor) -> MetaTensor:
        values = monai_volumes.resample_nearest(labels, before, size)
        return MetaTensor(values, affine=before, applied_operations=labels.applied_operations)

    return resampled, undo
