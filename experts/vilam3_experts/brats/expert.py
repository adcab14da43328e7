"""The expert BRATS: T1c, T1, T2 and FLAIR of one head → necrosis, edema and enhancing tumor.

The steps are those of MONAI's bundle: the non-zero voxels of each sequence are standardised, a window slides
over the scan, and voxels whose sigmoid reaches 0.5 belong to a region. The network sees the index order in
which BraTS stores its scans, whatever that of the files, so a scan has the same result in every format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from monai.inferers.inferer import SlidingWindowInferer
from monai.transforms.intensity.array import NormalizeIntensity
from monai.utils.type_conversion import convert_to_tensor

from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.brats.bundle import Settings, find_bundle, load_network, read_settings
from vilam3_experts.brats.grid import align
from vilam3_experts.weights import Weights
from vilam3_jax.data.experts.labels import label_table
from vilam3_jax.data.experts.record import Verdict
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError

_THRESHOLD = 0.5
_LABELS = {"wt": 2, "tc": 1, "et": 4}  # painted in this order
_SMALLEST_WINDOW = 64
_WINDOW_STEP = 32


def create(weights: Weights) -> Brats:
    """Builds the expert from the bundle in `weights.folder`; raises `UserError` if that does not fit."""
    if weights.folder is None:
        raise UserError("BRATS needs its bundle; give --weights with the folder of brats_mri_segmentation")
    bundle = find_bundle(weights.folder)
    settings = read_settings(bundle)
    network, sha256 = load_network(bundle, settings)
    return Brats(network, settings, weights.sha256 or sha256)


class Brats:
    """The expert: a network with the pre- and post-processing of its bundle.

    It uses the GPU in mixed precision if torch finds one. The network maps float32 [1, 4, I, J, K] to logits
    [1, 3, I, J, K]; `window` overrides that of the settings.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        settings: Settings,
        weights_sha256: str = "",
        window: tuple[int, ...] | None = None,
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = network.to(self._device).eval()
        self._settings, self._sha256 = settings, weights_sha256
        self._window = window or settings.window

    def smaller(self) -> Brats | None:
        """The same network with a smaller window, which the verdicts state; None below the smallest."""
        window = smaller_window(self._window)
        return None if window is None else Brats(self._network, self._settings, self._sha256, window)

    def run(self, data: Mapping[str, Volume], args: str) -> Output:
        """Segments one head from `t1c`, `t1`, `t2` and `flair`; the label map is on the grid of `t1c`.

        Raises `ExpertFailure` if a scan is uniform, or the scans show different places.
        """
        del args
        probabilities, verdicts = self.probabilities(data)
        return Output(
            labels=label_map(probabilities),
            label_names=label_table("BRATS"),
            weights_sha256=self._sha256,
            verdicts=verdicts,
        )

    def probabilities(
        self, volumes: Mapping[str, Volume]
    ) -> tuple[dict[str, np.ndarray], tuple[Verdict, ...]]:
        """Region (`tc`, `wt`, `et`) to probabilities, float32 [X, Y, Z] on the grid of the T1c; and verdicts.

        The verdicts are on resampling and on doubtful inputs. Raises `ExpertFailure` as `run`.
        """
        settings = self._settings
        for role, volume in volumes.items():
            voxels = volume.voxels if volume.valid is None else volume.voxels[volume.valid]
            if voxels.size == 0 or voxels.min() == voxels.max():
                raise ExpertFailure(f"{role} has no contrast: all its voxels are equal")
        aligned = align({"t1c": volumes["t1c"], **volumes}, settings.axcodes, settings.pixdim)
        image = torch.stack([aligned.images.pop(role) for role in settings.channels])
        normalised = NormalizeIntensity(nonzero=True, channel_wise=True)(image)
        image = cast(torch.Tensor, convert_to_tensor(normalised, track_meta=False))
        verdicts = aligned.verdicts
        if self._window != settings.window:
            used, wanted = (" x ".join(map(str, window)) for window in (self._window, settings.window))
            message = f"the memory took windows of {used} voxels instead of {wanted}; its result may differ"
            verdicts += (Verdict("window", "warn", "after", message=message),)
        regions = zip(settings.regions, self._infer(image[None]).sigmoid_(), strict=True)
        return {name: aligned.to_reference(region) for name, region in regions}, verdicts

    def _infer(self, image: torch.Tensor) -> torch.Tensor:
        """Logits float32 [3, I, J, K]. The device holds one window at a time, the CPU the sums of all."""
        inferer = SlidingWindowInferer(
            self._window,
            sw_batch_size=1,
            overlap=self._settings.overlap,
            sw_device=self._device,
            device=torch.device("cpu"),
        )
        with torch.no_grad(), torch.autocast("cuda", enabled=self._device.type == "cuda"):
            logits = inferer(image, self._network)
        return cast(torch.Tensor, logits)[0].float()


def label_map(probabilities: Mapping[str, np.ndarray]) -> np.ndarray:
    """Labels uint8 [X, Y, Z] of the nested regions: edema 2, core 1 over it, enhancing tumor 4 over both.

    A probability of exactly 0.5 is inside a region, as in MONAI's `AsDiscrete`.
    """
    labels = np.zeros(next(iter(probabilities.values())).shape, np.uint8)
    for region, label in _LABELS.items():
        labels[probabilities[region] >= _THRESHOLD] = label
    return labels


def smaller_window(window: Sequence[int]) -> tuple[int, ...] | None:
    """About half of a window along each axis, in steps of the network; None below the smallest window."""
    if max(window) <= _SMALLEST_WINDOW:
        return None
    return tuple(max(_SMALLEST_WINDOW, math.ceil(n / 2 / _WINDOW_STEP) * _WINDOW_STEP) for n in window)
