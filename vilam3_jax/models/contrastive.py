"""The two towers of stage 1, which embed images and texts in a common space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models.layers import Init
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.models.siglip import SiglipText, SiglipVision
from vilam3_jax.sharding.logical_axes import shard


class TwoTower(nnx.Module):
    """SigLIP. `logit_scale` is a logarithm and starts at log 10, as in the paper.

    `logit_bias` starts at `text_tower.logit_bias`; the paper's -10 suits batches of 32 thousand pairs, use
    about -log(B) for B pairs.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        if cfg.text_tower is None or cfg.vision_tower is None:
            raise UserError("config model: task='contrastive' needs model.vision_tower and model.text_tower")
        if cfg.vision_tower.type != "siglip":
            raise UserError(
                f"model.vision_tower.type={cfg.vision_tower.type!r} has no pooled output to train "
                "against texts; use 'siglip' for task='contrastive'"
            )
        init = Init(rngs=rngs, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        self.vision_tower = SiglipVision(cfg.vision_tower, remat=cfg.remat, **init)
        self.text_tower = SiglipText(cfg.text_tower, cfg.vision_tower.hidden_size, remat=cfg.remat, **init)
        self.logit_scale = nnx.Param(jnp.log(jnp.asarray(10.0, cfg.param_dtype)))
        self.logit_bias = nnx.Param(jnp.asarray(cfg.text_tower.logit_bias, cfg.param_dtype))

    def __call__(
        self, images: jax.Array, text_tokens: jax.Array, text_valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Embeds the arrays of a `PairBatch`.

        Returns:
          Image and text embeddings, float32 [B, E] of unit length.
        """
        image = self.vision_tower.pooled(images)
        text = self.text_tower(text_tokens, text_valid)
        return shard(_unit(image), "batch", "embed"), shard(_unit(text), "batch", "embed")


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)
