"""Next-token prediction over packed rows: stages 2a to 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vilam3_jax.data.batch_formats import BatchFormat, PackedRows
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.models import families
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.ops import losses
from vilam3_jax.tasks.task import LossSums, ParameterUse, Work, tower_attention_flops


class Generative:
    """The task of packed token sequences."""

    name = "generative"
    batch_format: type[BatchFormat] = PackedRows
    batch_key = "data.global_rows"
    can_accumulate = True

    def loss(self, model: Any, batch: PackedBatch, chunk: int) -> LossSums:
        """Cross entropy summed over supervised tokens; `correct` counts those predicted by arg max."""
        hidden = model(batch)
        total, weight, correct = losses.chunked_cross_entropy(
            hidden, model.llm.head_kernel(), batch.tokens, batch.loss_weights, batch.segment_ids, chunk=chunk
        )
        return LossSums(total, weight, correct)

    def work(self, model: ModelConfig, batch: PackedBatch) -> Work:
        real = batch.segment_ids > 0
        # A token at position p attends to p + 1/2 keys, so a sample of n tokens has n**2 / 2 pairs.
        seen = attended_keys(batch.positions, _windows(model))
        attended = jnp.where(real, seen, 0.0)
        counts = (real, batch.loss_weights != 0, batch.image_valid, attended)
        return Work(*(jnp.sum(count, dtype=jnp.float32) for count in counts))

    def slots(self, batch: PackedBatch) -> tuple[int, int]:
        return batch.segment_ids.size, batch.image_valid.size

    def full_work(self, model: ModelConfig, data: DataConfig) -> Work:
        """See `Task`: every row is one sample, every position a target, every image slot used."""
        tokens = data.global_rows * data.seq_len
        pairs = float(np.sum(attended_keys(np.arange(data.seq_len), _windows(model))))
        return Work(tokens, tokens, data.groups * data.images_per_group, data.global_rows * pairs)

    def parameter_use(self, model: ModelConfig, path: str) -> ParameterUse:
        tower = model.vision_tower
        component, _, name = path.partition("/")
        if path == "llm/embed/embedding":
            return ParameterUse("targets", 1 if model.llm.tie_embeddings else 0)
        if component == "vision_tower":
            tiles, patches = tiles_per_input(model), tower_patches(tower)
            if name == "patch_embed/kernel":
                return ParameterUse("images", tiles * (tower.image_size // tower.patch_size) ** 2)
            layers = tower.feature_layers / tower.num_layers
            return ParameterUse("images", tiles * patches * layers if name.startswith("blocks/") else 0)
        if component == "projector":
            return ParameterUse("images", model.tokens_per_image)
        return ParameterUse("targets" if name.startswith("lm_head/") else "tokens", 1)

    def attention_flops(self, model: ModelConfig) -> Mapping[str, tuple[str, float]]:
        tower, llm = model.vision_tower, model.llm
        per_tile = tower_attention_flops(model, tower.feature_layers, tower_patches(tower))
        return {
            "vision_tower": ("images", tiles_per_input(model) * per_tile),
            "llm": ("attended", 4 * llm.num_heads * llm.head_dim * llm.num_layers),
        }

    def inputs(self, component: str) -> tuple[str, ...]:
        return {"projector": ("vision_tower",), "llm": ("vision_tower", "projector")}.get(component, ())


def attended_keys(positions: Any, windows: Sequence[int | None]) -> Any:
    """Number of keys that a token attends to, averaged over layers; its own key counts half.

    Args:
      positions: index of each token in its sample.
      windows: windows of every layer; None for full attention.
    """
    array: Any = jnp if isinstance(positions, jax.Array) else np
    full = sum(window is None for window in windows) / len(windows)
    seen = (positions + 0.5) * np.float32(full) if full else array.zeros(positions.shape, np.float32)
    for window in sorted({window for window in windows if window is not None}):
        share = np.float32(sum(other == window for other in windows) / len(windows))
        seen = seen + array.minimum(positions + 0.5, np.float32(window)) * share
    return seen


def tiles_per_input(model: ModelConfig) -> int:
    """How often the tower runs per input: once per tile of its scales (S2)."""
    layout = model.image_layout
    if layout.mode == "dynamic_s2" or not layout.scales:
        return 1
    return sum((scale // layout.tile_size) ** 2 for scale in layout.scales)


def tower_patches(tower: Any) -> int:
    """Positions in the blocks of a tower for one tile, class token included."""
    patches = families.get("vision_tower", tower.type).patches
    assert patches is not None
    return patches(tower)


def _windows(model: ModelConfig) -> Sequence[int | None]:
    return families.get("llm", model.llm.type).attention_windows(model.llm)
