"""The interface of training tasks, and the pytree registration of batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from vilam3_jax.data.batch_formats import BatchFormat
from vilam3_jax.data.batches import PackedBatch, PairBatch
from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.models.model_config import ModelConfig

for _batch in (PackedBatch, PairBatch):  # `data` is free of JAX
    jax.tree_util.register_dataclass(
        _batch, data_fields=[field.name for field in dataclasses.fields(_batch)], meta_fields=[]
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over a batch. Divided by `weight` they are global means, independent of packing.

    Attributes:
      loss: float32 scalar.
      weight: number of supervised tokens, or of pairs.
      correct: how many of them are predicted correctly.
    """

    loss: Any
    weight: Any
    correct: Any


class Work(NamedTuple):
    """Counts of a batch that determine its FLOPs; padding does not count.

    Attributes:
      tokens: positions of the text stream, image tokens included.
      targets: positions with a loss (generative).
      images: inputs of the vision tower.
      attended: pairs of positions that attend to each other, averaged over the layers: n**2 / 2 for n tokens
        with a causal mask, n**2 for a text of a contrastive run.
    """

    tokens: Any
    targets: Any
    images: Any
    attended: Any


class ParameterUse(NamedTuple):
    """How many times a parameter is multiplied by an activation.

    Attributes:
      unit: field of `Work` to count.
      times: multiplications per unit.
    """

    unit: str
    times: float


class Task(Protocol):
    """A way to train: `generative` or `contrastive`.

    Attributes:
      name: value of `config.task`.
      batch_format: how its batches are made.
      batch_key: config key of the size of its global batch.
      can_accumulate: whether a batch may be computed in micro-batches.
    """

    name: str
    batch_format: type[BatchFormat]
    batch_key: str
    can_accumulate: bool

    def loss(self, model: Any, batch: Any, chunk: int) -> LossSums:
        """The loss of a batch.

        Args:
          model: merged from its structure and parameters.
          batch: of `batch_format`.
          chunk: positions of a row whose logits exist at a time.
        """
        ...

    def work(self, model: ModelConfig, batch: Any) -> Work:
        """The work in a batch, as float32 scalars on its device."""
        ...

    def slots(self, batch: Any) -> tuple[int, int]:
        """Token positions and image slots of a batch, filled or not."""
        ...

    def full_work(self, model: ModelConfig, data: DataConfig) -> Work:
        """The most work that a batch can hold."""
        ...

    def parameter_use(self, model: ModelConfig, path: str) -> ParameterUse:
        """Use of a parameter in matrix products."""
        ...

    def attention_flops(self, model: ModelConfig) -> Mapping[str, tuple[str, float]]:
        """Component → (field of `Work`, forward operations per unit) of its attention."""
        ...

    def inputs(self, component: str) -> tuple[str, ...]:
        """Components that feed a component; if one of them learns, gradients pass through it."""
        ...


def tower_attention_flops(model: ModelConfig, layers: int, patches: int) -> float:
    """Operations of attention in a vision tower for one of its inputs, forward."""
    return 4.0 * model.vision_tower.hidden_size * layers * patches**2
