"""InternViT (arXiv:2312.14238), the image tower of VILA-1.5-40b (layout of `intern_vit_6b` checkpoints)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.models.layers import GeluMLP, RMSNorm, SelfAttention, run_stack
from vilam3_jax.models.siglip import PatchEmbed, check_images, feature_layers
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard

# ImageNet's, with which the released tower was trained; of pixels in 0..1.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_LAYER_SCALE = 0.1


class InternBlock(nnx.Module):
    """Pre-norm block whose two branches are scaled per channel (LayerScale, arXiv:2103.17239).

    The checkpoint's one `qkv` matrix is three here, so that each divides over devices by heads.
    """

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: Any, param_dtype: Any):
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, stack=stack)
        width, eps = cfg.hidden_size, cfg.norm_eps
        self.norm1 = RMSNorm(width, eps=eps, **kwargs)
        self.attn = SelfAttention(width, cfg.num_heads, qkv_bias=False, qk_norm_eps=eps, rngs=rngs, **kwargs)
        self.scale1 = nnx.Param(jnp.full((*stack, width), _LAYER_SCALE, param_dtype))
        self.norm2 = RMSNorm(width, eps=eps, **kwargs)
        self.mlp = GeluMLP(width, cfg.mlp_dim, approximate=False, rngs=rngs, **kwargs)
        self.scale2 = nnx.Param(jnp.full((*stack, width), _LAYER_SCALE, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        attended = self.attn(self.norm1(x)) * self.scale1[...].astype(x.dtype)
        x = shard(x + attended, "batch", None, "embed")
        moved = self.mlp(self.norm2(x)) * self.scale2[...].astype(x.dtype)
        return shard(x + moved, "batch", None, "embed")


class InternViT(nnx.Module):
    """Image tower with a class token, which takes part in attention and is not among the features."""

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str):
        self.image_size = cfg.image_size
        self.grid = cfg.image_size // cfg.patch_size
        self.width = cfg.hidden_size
        self.remat = remat
        self.num_feature_layers = feature_layers(cfg)
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.hidden_size, **kwargs)
        stddev = cfg.hidden_size**-0.5
        token = jax.random.normal(rngs.params(), (1, cfg.hidden_size), param_dtype)
        self.class_embed = nnx.Param(token * stddev)
        table = jax.random.normal(rngs.params(), (1 + self.grid**2, cfg.hidden_size), param_dtype)
        self.pos_embed = nnx.Param(table * stddev)
        self.blocks = InternBlock(cfg, stack=(cfg.num_layers,), **kwargs)

    def features(self, images: jax.Array) -> jax.Array:
        """Patch features: uint8 [N, S, S, 3] -> [N, T, D], hidden state `select_layer`, no class token.

        There is no norm after it, and later blocks are not computed.
        """
        check_images(images, self.image_size)
        return self.pixel_features(images.astype(jnp.float32))

    @logical_axes.of_a_tower()
    def pixel_features(self, pixels: jax.Array) -> jax.Array:
        """`features` of interpolated pixels: float32 [N, S, S, 3] on the scale of 0..255."""
        x = (pixels / 255 - jnp.asarray(_MEAN)) / jnp.asarray(_STD)
        x = self.patch_embed(x)
        token = jnp.broadcast_to(self.class_embed[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        x = shard(x, "batch", None, "embed")
        return run_stack(self.blocks, x, remat=self.remat, count=self.num_feature_layers)[:, 1:]
