"""Sigmoid contrastive training of an image and a text tower: stage 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vilam3_jax.data.batch_formats import BatchFormat, Pairs
from vilam3_jax.data.batches import PairBatch
from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.ops import losses
from vilam3_jax.tasks.generative import tower_patches
from vilam3_jax.tasks.task import LossSums, ParameterUse, Work, tower_attention_flops


class Contrastive:
    """The task of image-text pairs."""

    name = "contrastive"
    batch_format: type[BatchFormat] = Pairs
    batch_key = "data.global_pairs"
    can_accumulate = False  # the loss compares all pairs of a batch

    def loss(self, model: Any, batch: PairBatch, chunk: int) -> LossSums:
        """Sigmoid loss summed over pairs.

        `correct` counts images whose own text, or an identical one, scores highest; many texts are identical.
        """
        image, text = model(batch.images, batch.text_tokens, batch.text_valid)
        total, weight, correct = losses.sigmoid_contrastive_loss(
            image,
            text,
            model.logit_scale[...],
            model.logit_bias[...],
            valid=batch.text_valid.any(axis=1),
            labels=batch.text_tokens,
        )
        return LossSums(total, weight, correct)

    def work(self, model: ModelConfig, batch: PairBatch) -> Work:
        real = batch.text_valid
        attended = jnp.square(real.sum(axis=1, dtype=jnp.float32))
        counts = (real, jnp.zeros((), bool), real.any(axis=1), attended)
        return Work(*(jnp.sum(count, dtype=jnp.float32) for count in counts))

    def slots(self, batch: PairBatch) -> tuple[int, int]:
        return batch.text_valid.size, batch.text_valid.shape[0]

    def full_work(self, model: ModelConfig, data: DataConfig) -> Work:
        tokens = data.global_pairs * data.text_len
        return Work(tokens, 0, data.global_pairs, tokens * data.text_len)

    def parameter_use(self, model: ModelConfig, path: str) -> ParameterUse:
        tower, patches = model.vision_tower, tower_patches(model.vision_tower)
        component, _, name = path.partition("/")
        if component == "text_tower":
            return ParameterUse("images", 1) if name == "head/kernel" else ParameterUse("tokens", 1)
        if name == "patch_embed/kernel":
            return ParameterUse("images", (tower.image_size // tower.patch_size) ** 2)
        # The probe of the pooling head attends once to all patches.
        pools_all = re.match(r"head/attn/[kv]/", name) or name.startswith("blocks/")
        return ParameterUse("images", patches if pools_all else 1)

    def attention_flops(self, model: ModelConfig) -> Mapping[str, tuple[str, float]]:
        tower, text = model.vision_tower, model.text_tower
        assert text is not None
        patches = tower_patches(tower)
        pooled = 4 * tower.hidden_size * patches
        return {
            "vision_tower": ("images", tower_attention_flops(model, tower.num_layers, patches) + pooled),
            "text_tower": ("attended", 4 * text.hidden_size * text.num_layers),
        }

    def inputs(self, component: str) -> tuple[str, ...]:
        return ()
