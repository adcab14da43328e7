"""Floating-point operations that a run's model needs, in one accounting for MFU.

Counted: the products of vision tower, projector and LLM (stage 1: of both towers), a multiplication and an
addition each one operation; causal attention by the half of the square that it looks at. Not counted:
padding, what a backward pass computes a second time (rematerialisation), norms, softmax, the optimizer, and
stage 1's matrix of similarities. A frozen part counts what it must do: forward, and backward to its inputs
if something before it learns.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from vilam3_jax.config import ConfigDict, image_layout
from vilam3_jax.data.batches import Batch, PairBatch
from vilam3_jax.models import param_paths, vila
from vilam3_jax.models.siglip import feature_layers
from vilam3_jax.training import optimizer as optimizer_lib

_KERNEL = re.compile(r"(kernel|lora_[ab])")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch holds; what is padding does not count.

    Attributes:
      tokens: positions of the text stream, images' tokens among them.
      targets: positions with a loss (generative; 0 in stage 1).
      images: inputs of the vision tower.
      attended: pairs of positions of which one looks at the other: n**2 / 2 for n tokens one after the other
        (causal), n**2 for a text of stage 1.
    """

    tokens: float
    targets: float
    images: float
    attended: float


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """Operations of a training step, forward and backward, per unit of `Work`; made by `model_flops`.

    Attributes:
      per_token: the layers of the LLM, or of the text tower.
      per_target: the LLM's head.
      per_image: vision tower with its attention, and projector; in stage 1 the heads of both towers.
      per_attended: attention of the LLM, or of the text tower.
    """

    per_token: float
    per_target: float
    per_image: float
    per_attended: float

    def of(self, work: Work) -> float:
        """Operations of one step on `work`."""
        return (
            self.per_token * work.tokens
            + self.per_target * work.targets
            + self.per_image * work.images
            + self.per_attended * work.attended
        )


def batch_work(batch: Batch) -> Work:
    """The work of a batch as the loader yields it."""
    if isinstance(batch, PairBatch):
        lengths = batch.text_valid.sum(axis=1).astype(np.int64)
        return Work(int(lengths.sum()), 0, int((lengths > 0).sum()), int((lengths**2).sum()))
    segments = batch.segment_ids
    most = int(segments.max(initial=0)) + 1
    rows = segments + most * np.arange(len(segments))[:, None]
    lengths = np.bincount(rows[segments > 0])
    return Work(
        tokens=int(lengths.sum()),
        targets=int(np.count_nonzero(batch.loss_weights)),
        images=int(np.count_nonzero(batch.image_valid)),
        attended=int((lengths.astype(np.int64) ** 2).sum()) / 2,
    )


def full_work(config: ConfigDict) -> Work:
    """The most a batch can hold: a row is one sample, every position a target, every slot used."""
    data = config.data
    if config.kind == "contrastive":
        tokens = data.global_pairs * data.text_len
        return Work(tokens, 0, data.global_pairs, tokens * data.text_len)
    tokens = data.global_rows * data.seq_len
    images = data.global_rows // data.rows_per_group * data.images_per_group
    return Work(tokens, tokens, images, tokens * data.seq_len / 2)


def model_flops(config: ConfigDict) -> ModelFlops:
    """Counts the products of `config`'s model from the shapes of its parameters; allocates nothing.

    Raises:
      UserError: model or tables do not fit.
    """
    _, nested = vila.abstract_model(config.model, config.kind)
    shapes = param_paths.flatten(nested)
    rates = optimizer_lib.multipliers(config, list(shapes))
    passes = _Passes(rates, contrastive=config.kind == "contrastive")
    sums: dict[str, float] = {"token": 0.0, "target": 0.0, "image": 0.0}
    for path, leaf in shapes.items():
        unit, times = _use(config, path)
        sums[unit] += 2 * math.prod(leaf.shape) * times * passes.of(path)
    model, tower = config.model, config.model.vision_tower
    per_pair = 4 * tower.hidden_size * _tower_layers(config) * passes.attention("vision_tower")
    sums["image"] += _tiles(config) * _patches(config) ** 2 * per_pair
    if config.kind == "contrastive":
        text = model.text_tower
        attended = 4 * text.hidden_size * text.num_layers * passes.attention("text_tower")
        pooled = 4 * tower.hidden_size * _patches(config) * passes.attention("vision_tower")
        sums["image"] += pooled  # the probe asks all patches once
    else:
        llm = model.llm
        attended = 4 * llm.num_heads * llm.head_dim * llm.num_layers * passes.attention("llm")
    return ModelFlops(sums["token"], sums["target"], sums["image"], attended)


# Parts through which a gradient must pass if one of these learns.
_BEFORE = {"projector": ("vision_tower",), "llm": ("vision_tower", "projector")}


class _Passes:
    """How often each product is done: forward, for the gradient of its input, for that of its kernel.

    The first layer that learns is counted like those after it, though its input needs no gradient.
    """

    def __init__(self, rates: Mapping[str, float], contrastive: bool) -> None:
        self._rates = rates
        self._before = {} if contrastive else _BEFORE

    def _learns(self, part: str) -> bool:
        return any(rate for path, rate in self._rates.items() if path.startswith(part + "/"))

    def attention(self, part: str) -> int:
        """1 forward, and 2 backward if a gradient passes through `part`."""
        passes = any(self._learns(name) for name in (part, *self._before.get(part, ())))
        return 3 if passes else 1

    def of(self, path: str) -> int:
        part = path.split("/")[0]
        to_input = self.attention(part) == 3 and not path.startswith("vision_tower/patch_embed")
        return 1 + to_input + bool(self._rates[path])


def _use(config: ConfigDict, path: str) -> tuple[str, float]:
    """(unit, how often each element of this parameter is a factor per unit); 0 for what is in no product."""
    model, tied = config.model, config.kind != "contrastive" and config.model.llm.tie_embeddings
    if tied and path == "llm/embed/embedding":
        return "target", 1
    if not _KERNEL.fullmatch(path.rsplit("/", 1)[-1]):
        return "image", 0
    patches, tiles = _patches(config), _tiles(config)
    if path == "vision_tower/patch_embed/kernel":
        return "image", tiles * (model.vision_tower.image_size // model.vision_tower.patch_size) ** 2
    if path.startswith("vision_tower/blocks/"):
        return "image", tiles * patches * _tower_layers(config) / model.vision_tower.num_layers
    if path.startswith("vision_tower/head/"):
        if config.kind != "contrastive":
            return "image", 0
        return "image", patches if re.search(r"attn/[kv]/", path) else 1
    if path.startswith("projector/"):
        return "image", vila.tokens_per_image(model)
    if path == "text_tower/head/kernel":
        return "image", 1
    return ("target", 1) if path.startswith("llm/lm_head/") else ("token", 1)


def _patches(config: ConfigDict) -> int:
    """Positions of one tile in the vision tower, InternViT's class token among them."""
    tower = config.model.vision_tower
    return (tower.image_size // tower.patch_size) ** 2 + (tower.type == "intern_vit")


def _tiles(config: ConfigDict) -> int:
    """How often the tower runs for one input: once for every tile of its scales (S2)."""
    layout = image_layout(config.model)
    if config.kind == "contrastive" or layout.mode == "dynamic_s2" or not layout.scales:
        return 1
    return sum((scale // layout.tile_size) ** 2 for scale in layout.scales)


def _tower_layers(config: ConfigDict) -> int:
    tower = config.model.vision_tower
    return tower.num_layers if config.kind == "contrastive" else feature_layers(tower)
