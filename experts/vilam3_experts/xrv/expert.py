"""The ensemble as an expert: films to probabilities of 18 findings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.weights import Weights
from vilam3_experts.xrv import networks
from vilam3_experts.xrv.members import Member, Table, load_table
from vilam3_jax.errors import UserError

# Fastest settings by `benchmarks/cxr_ensemble.py`. On a CPU, a DenseNet is limited by memory bandwidth and
# gains from channels_last and from batches; a ResNet at 512 pixels overflows the cache beyond one film.
_CPU_BATCH = {"densenet121": 8, "resnet50": 1}
_GPU_BATCH = 32
_FORMAT = torch.channels_last
# Grey level to network units, -1024..1024, in the order of operations of torchxrayvision's `normalize`.
_UNITS = (2 * (np.arange(256, dtype=np.float32) / 255) - 1.0) * 1024


class _MemberNetwork:
    """One member on a device."""

    def __init__(self, member: Member, content: bytes, device: torch.device) -> None:
        network, self.thresholds = networks.load(member, content)
        self.resolution = member.resolution
        self._batch = _CPU_BATCH[member.architecture] if device.type == "cpu" else _GPU_BATCH
        self._device = device
        self._network = network.to(device=device, memory_format=_FORMAT)  # type: ignore[call-overload]

    def __call__(self, films: torch.Tensor) -> torch.Tensor:
        """Normalised probabilities [B, classes] of films [B, 1, S, S]; NaN for classes it does not know."""
        parts = [
            self._network(part.to(device=self._device, memory_format=_FORMAT))[: len(part)].cpu()
            for part in films.split(self._batch)
        ]
        return networks.normalise(torch.sigmoid(torch.cat(parts)), self.thresholds)


class Ensemble:
    """Eight networks over one decoded film.

    The probability of a class is the mean over the members that VILA-M3 uses for it, without members that
    were not trained on the class. `ParityEnsemble` counts `untrained_value` for those, as the reference does.
    """

    untrained_value: float | None = None

    def __init__(self, weights: Weights, *, table: Table | None = None) -> None:
        """Loads one safetensors file per member, under the member's name; `table` replaces `ensemble.json`.

        Raises `UserError` if a file is missing or does not fit its network.
        """
        self._table = table or load_table()
        missing = [m.weights_file for m in self._table.members if m.name not in weights.files]
        if missing:
            raise UserError(
                f"CXR lacks {', '.join(missing)}; run `vilam3-experts weights --fetch --expert CXR`"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._networks = [_MemberNetwork(m, weights.files[m.name], device) for m in self._table.members]
        self._included = torch.tensor(
            [[self._table.includes(m.name, c) for c in self._table.classes] for m in self._table.members]
        )

    def run(self, data: np.ndarray, args: str) -> Output:
        """Analyses one film, uint8 [H, W, 3].

        Returns the probability of each finding that a member knows, 0.5 at the operating point. Raises
        `ExpertFailure` if it is not an image, or a network returns a value that is not finite.
        """
        (answer,) = self.run_batch([data], args)
        if isinstance(answer, ExpertFailure):
            raise answer
        return answer

    def run_batch(self, items: Sequence[np.ndarray], args: str) -> list[Output | ExpertFailure]:
        """Analyses several films of any sizes; returns one answer per film, in order.

        The answers agree with those of `run` to 1e-6; torch picks its kernels by batch size. Each film is
        cropped once, and resized once per resolution. Memory grows by 1.3 MB per film.
        """
        del args  # the card has none
        answers: list[Output | ExpertFailure] = [
            ExpertFailure("CXR reads images of 8 bits, height × width × channels") for _ in items
        ]
        valid = [n for n, item in enumerate(items) if _is_image(item)]
        if not valid:
            return answers
        films: dict[int, list[torch.Tensor]] = {network.resolution: [] for network in self._networks}
        for n in valid:
            square = centre_square(items[n])
            for side, resized in films.items():
                resized.append(resize(square, side))
        # cuDNN's default, TF32 for float32 convolutions, changes the third digit of probabilities.
        full_precision = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with torch.inference_mode(), full_precision:
            stacks = {side: torch.stack(resized) for side, resized in films.items()}
            each = torch.stack([network(stacks[network.resolution]) for network in self._networks])
        for n, members in zip(valid, each.unbind(1), strict=True):
            answers[n] = self._combine(members)
        return answers

    def _combine(self, members: torch.Tensor) -> Output | ExpertFailure:
        """The mean over the members, [members, classes], of one film."""
        known = torch.stack([~network.thresholds.isnan() for network in self._networks])
        if not bool(members[known].isfinite().all()):
            return ExpertFailure("a network of CXR gives no finite number for this film")
        counted = self._included & known
        values = members.double().where(known, 0.0)
        if self.untrained_value is not None:
            values, counted = values.where(known, self.untrained_value), self._included
        number = counted.sum(0)
        means = (values * counted).sum(0) / number
        rows = zip(self._table.classes, means.tolist(), number.tolist(), strict=True)
        return Output(probabilities={name: mean for name, mean, n in rows if n})


class ParityEnsemble(Ensemble):
    """The reference's mean: a member counts 0.5 for a class that it was not trained on."""

    untrained_value = 0.5


def centre_square(image: np.ndarray) -> torch.Tensor:
    """Crops the first channel of uint8 [H, W, C] to its central square; float32 [1, S, S] in -1024..1024."""
    height, width = image.shape[:2]
    side = min(height, width)
    # Both halves are rounded down, as in torchxrayvision's `XRayCenterCrop`.
    top, left = height // 2 - side // 2, width // 2 - side // 2
    return torch.from_numpy(_UNITS[image[top : top + side, left : left + side, 0]])[None]


def resize(square: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes float32 [1, S, S] as torchxrayvision 1.2.4, the release behind VILA-M3's training texts.

    Bilinear, half-pixel centres, no antialiasing. Later releases (such as 1.5.7) antialias, and return other
    probabilities for films larger than the network's input.
    """
    if square.shape[-1] == side:
        return square
    size = (side, side)
    return torch.nn.functional.interpolate(square[None], size, mode="bilinear", antialias=False)[0]


def _is_image(item: object) -> bool:
    return isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.size > 0
