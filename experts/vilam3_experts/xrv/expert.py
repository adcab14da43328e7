"""The ensemble as an expert: films in, probabilities of 18 findings out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.weights import Weights
from vilam3_experts.xrv import networks
from vilam3_experts.xrv.members import Member, Table, load_table
from vilam3_experts.xrv.preprocess import centre_square, resize
from vilam3_jax.errors import UserError

_GPU_BATCH = 32


@dataclasses.dataclass(frozen=True)
class _Placement:
    """How a network runs fastest; measured by `benchmarks/cxr_ensemble.py`."""

    batch: int
    memory_format: torch.memory_format


# A DenseNet is bound by memory traffic and gains from both; a ResNet at 512 pixels overflows the cache with
# more than one film.
_ON_CPU = {
    "densenet121": _Placement(8, torch.channels_last),
    "resnet50": _Placement(1, torch.channels_last),
}


class _Network:
    """One member, placed on a device."""

    def __init__(self, member: Member, content: bytes, device: torch.device) -> None:
        network, self.thresholds = networks.load(member, content)
        place = _ON_CPU[member.architecture]
        self.resolution = member.resolution
        self._format = place.memory_format
        self._batch = place.batch if device.type == "cpu" else _GPU_BATCH
        self._device = device
        self._network = network.to(device=device, memory_format=self._format)  # type: ignore[call-overload]

    def __call__(self, films: torch.Tensor) -> torch.Tensor:
        """Normalised probabilities [B, classes] of films [B, 1, S, S]; NaN for classes it does not know."""
        parts = [
            self._network(part.to(device=self._device, memory_format=self._format))[: len(part)].cpu()
            for part in films.split(self._batch)
        ]
        return networks.normalise(torch.sigmoid(torch.cat(parts)), self.thresholds)


class Ensemble:
    """Eight networks over one decoded film.

    The mean of a class is taken over the members that VILA-M3 asks for it. Members that were not trained on
    the class are left out; see `ParityEnsemble` for the reference's way.
    """

    unknown: float | None = None  # what a member counts for a class it does not know; None leaves it out

    def __init__(self, weights: Weights, *, table: Table | None = None) -> None:
        """Loads every member.

        Args:
          weights: one safetensors file for each member, under the member's name.
          table: other members than those of `ensemble.json`.

        Raises:
          UserError: a file is missing or does not fit its network.
        """
        self._table = table or load_table()
        missing = [m.weights_file for m in self._table.members if m.name not in weights.files]
        if missing:
            raise UserError(
                f"CXR lacks {', '.join(missing)}; run `vilam3-experts weights --fetch --expert CXR`"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._networks = {m.name: _Network(m, weights.files[m.name], device) for m in self._table.members}
        self._asked = torch.tensor(
            [[self._table.asked(m.name, c) for c in self._table.classes] for m in self._table.members]
        )

    def run(self, data: np.ndarray, args: str) -> Output:
        """Analyses one film, uint8 [H, W, 3].

        Returns:
          Probability of each finding that a member knows, 0.5 at the operating point.

        Raises:
          ExpertFailure: no picture, or a network gives no finite number for it.
        """
        (answer,) = self.run_batch([data], args)
        if isinstance(answer, ExpertFailure):
            raise answer
        return answer

    def run_batch(self, items: Sequence[np.ndarray], args: str) -> list[Output | ExpertFailure]:
        """Analyses several films of any sizes at once; one answer each, in their order.

        On a CPU the answers are bit for bit those of `run`. Each film is cropped once, and resized once for
        each resolution. Memory grows by 1.3 MB a film.
        """
        del args  # the card has none
        answers: list[Output | ExpertFailure] = [
            ExpertFailure("CXR reads pictures of 8 bits, height × width × channels") for _ in items
        ]
        pictures = [n for n, item in enumerate(items) if _is_picture(item)]
        if not pictures:
            return answers
        resolutions = sorted({network.resolution for network in self._networks.values()})
        films: dict[int, list[torch.Tensor]] = {side: [] for side in resolutions}
        for n in pictures:
            square = centre_square(items[n])
            for side in resolutions:
                films[side].append(resize(square, side))
        with torch.inference_mode(), _full_precision():
            stacks = {side: torch.stack(parts) for side, parts in films.items()}
            each = torch.stack([network(stacks[network.resolution]) for network in self._networks.values()])
        for n, members in zip(pictures, each.unbind(1), strict=True):
            answers[n] = self._combine(members)
        return answers

    def _combine(self, members: torch.Tensor) -> Output | ExpertFailure:
        """The mean over members of one film, [members, classes]."""
        known = torch.stack([~network.thresholds.isnan() for network in self._networks.values()])
        if not bool(members[known].isfinite().all()):
            return ExpertFailure("a network of CXR gives no finite number for this film")
        counted = self._asked & known
        values = members.double().where(known, 0.0)
        if self.unknown is not None:
            values, counted = values.where(known, self.unknown), self._asked
        number = counted.sum(0)
        means = (values * counted).sum(0) / number
        return Output(
            probabilities={
                name: mean
                for name, mean, n in zip(self._table.classes, means.tolist(), number.tolist(), strict=True)
                if n
            }
        )


class ParityEnsemble(Ensemble):
    """The reference's mean: a member counts 0.5 for a class that it was not trained on."""

    unknown = 0.5


def _is_picture(item: object) -> bool:
    return isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.size > 0


def _full_precision():
    """cuDNN rounds float32 convolutions to TF32 by default, which moves probabilities in the third digit."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
