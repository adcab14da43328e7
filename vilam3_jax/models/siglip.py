"""SigLIP's image and text towers (arXiv:2303.15343; layout of Hugging Face's SiglipModel)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models.layers import Embed, EncoderBlock, GeluMLP, LayerNorm, Linear, SelfAttention, run_stack
from vilam3_jax.ops.attention import row_length
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard
from vilam3_jax.sharding.matmul import einsum

_SMOOTH_NORM = 4.0  # of a first filter's smooth part; its white part has norm 1
# Of a new position table: half the size of a patch's embedding after these filters. A small one (0.07) takes
# long to be heard in the pooled mean: 13 classes of slices were at a loss of 2.6 on held-out patients after
# 100 steps, with this one at 2.0.
_POSITION_STD = 3.0
# Of new text embeddings, in units of width**-0.5: words count for more than where they stand.
_WORD_GAIN = 5.0


class PatchEmbed(nnx.Module):
    """Convolution whose stride is its kernel, VALID padding: border pixels that fill no patch are dropped.

    Parameters: kernel HWIO [p, p, 3, D], bias [D].
    """

    def __init__(self, patch_size: int, width: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        self.patch_size = patch_size
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(_first_filters(rngs.params(), patch_size, width, param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [N, S, S, 3] -> [N, (S // p)**2, D], patches row by row."""
        p = self.patch_size
        n, height, width, channels = images.shape
        rows, columns = height // p, width // p
        x = images[:, : rows * p, : columns * p].reshape(n, rows, p, columns, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, p * p * channels)
        kernel = self.kernel[...].astype(self.dtype)
        x = einsum("npi,io->npo", x.astype(self.dtype), kernel.reshape(-1, kernel.shape[-1]))
        return x + self.bias[...].astype(self.dtype)


def _first_filters(key: jax.Array, patch_size: int, width: int, dtype: Any) -> jax.Array:
    """Initial patch filters [p, p, 3, D]: mostly grey, of low frequency and without a mean, plus white noise.

    Pictures have their energy in low frequencies, and medical ones a black surround. White noise alone sees
    mostly the mean of a patch: a tower of 6 blocks was at a loss of 3.0 where one that started from these
    filters was at 1.9 (38 classes of slices, 80 steps). The noise gives the kernel its full rank.
    """
    smooth_key, white_key = jax.random.split(key)
    coarse = min(4, patch_size)
    shape = (patch_size, patch_size, 3, width)
    smooth = jax.random.normal(smooth_key, (coarse, coarse, 1, width), jnp.float32)
    smooth = jax.image.resize(smooth, (*shape[:2], 1, width), "linear")
    smooth = smooth - smooth.mean(axis=(0, 1, 2))
    smooth = _SMOOTH_NORM * smooth / jnp.sqrt(3 * jnp.square(smooth).sum(axis=(0, 1, 2)))
    white = jax.random.normal(white_key, shape, jnp.float32) / (3 * patch_size**2) ** 0.5
    return (smooth + white).astype(dtype)


def feature_layers(cfg: Any) -> int:
    """How many blocks run before hidden state `cfg.select_layer`.

    State 0 is the embedding, state i the output of block i, as in Hugging Face's list.

    Raises:
      UserError: there is no such state.
    """
    states = cfg.num_layers + 1
    if not -states <= cfg.select_layer < states:
        raise UserError(
            f"model.vision_tower.select_layer={cfg.select_layer} is none of the {states} hidden states; "
            f"use {-states} to {states - 1}"
        )
    return cfg.select_layer % states


def check_images(images: jax.Array, size: int) -> None:
    """Raises ValueError if `images` are not uint8 [N, size, size, 3]."""
    if images.dtype != jnp.uint8 or images.shape[1:] != (size, size, 3):
        raise ValueError(f"images must be uint8 [N, {size}, {size}, 3], not {images.dtype} {images.shape}")


class AttentionPool(nnx.Module):
    """Multi-head attention pooling: a learned probe asks all tokens once, then a residual MLP."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        eps: float,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
    ):
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.probe = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width), param_dtype) * width**-0.5)
        self.attn = SelfAttention(width, num_heads, rngs=rngs, **kwargs)
        self.norm = LayerNorm(width, eps=eps, **kwargs)
        self.mlp = GeluMLP(width, mlp_dim, rngs=rngs, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, T, D] -> [N, D]."""
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        # Placements are stated, as everywhere between two products: see `projector`.
        x = shard(self.attn(x, query=shard(probe, "batch", None, "embed")), "batch", None, "embed")
        return shard(x + self.mlp(self.norm(x)), "batch", None, "embed")[:, 0]


class SiglipVision(nnx.Module):
    """Image tower.

    All blocks, `post_norm` and, with `cfg.head`, the pooling head exist in every stage, so that stage 1 and
    later ones share parameters.
    """

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str):
        self.image_size = cfg.image_size
        self.grid = cfg.image_size // cfg.patch_size
        self.width = cfg.hidden_size
        self.remat = remat
        self.num_layers = cfg.num_layers
        self.num_feature_layers = feature_layers(cfg)
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.hidden_size, **kwargs)
        table = jax.random.normal(rngs.params(), (self.grid**2, cfg.hidden_size), param_dtype)
        self.pos_embed = nnx.Param(table * _POSITION_STD)
        shape = (cfg.hidden_size, cfg.num_heads, cfg.mlp_dim)
        self.blocks = EncoderBlock(*shape, eps=cfg.norm_eps, stack=(cfg.num_layers,), **kwargs)
        self.post_norm = LayerNorm(cfg.hidden_size, eps=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.head = AttentionPool(*shape, eps=cfg.norm_eps, **kwargs) if cfg.head else None

    @property
    def num_tokens(self) -> int:
        """Tokens per image before the projector."""
        return self.grid**2

    def _run(self, pixels: jax.Array, count: int) -> jax.Array:
        x = self.patch_embed(pixels / 127.5 - 1.0)
        x = shard(x + self.pos_embed[...].astype(x.dtype), "batch", None, "embed")
        tokens, length = x.shape[1], row_length(x.shape[1])
        if length == tokens:
            return run_stack(self.blocks, x, remat=self.remat, count=count)
        x = shard(jnp.pad(x, ((0, 0), (0, length - tokens), (0, 0))), "batch", None, "embed")
        valid = jnp.broadcast_to(jnp.arange(length) < tokens, x.shape[:2]).astype(jnp.int32)
        return run_stack(self.blocks, x, valid, remat=self.remat, count=count)[:, :tokens]

    def features(self, images: jax.Array) -> jax.Array:
        """Patch features for the projector: uint8 [N, S, S, 3] -> [N, T, D], hidden state `select_layer`.

        There is no norm after it, and later blocks are not computed.
        """
        check_images(images, self.image_size)
        return self.pixel_features(images.astype(jnp.float32))

    @logical_axes.of_a_tower()
    def pixel_features(self, pixels: jax.Array) -> jax.Array:
        """`features` of interpolated pixels: float32 [N, S, S, 3] on the scale of 0..255."""
        return self._run(pixels, self.num_feature_layers)

    @logical_axes.of_a_tower()
    def pooled(self, images: jax.Array) -> jax.Array:
        """Image embedding for contrastive training: uint8 [N, S, S, 3] -> [N, D], not normalised.

        Raises:
          UserError: the tower has no head.
        """
        if self.head is None:
            raise UserError("model.vision_tower.head=False: there is nothing to pool with; set it to True")
        check_images(images, self.image_size)
        return self.head(self.post_norm(self._run(images.astype(jnp.float32), self.num_layers)))


class SiglipText(nnx.Module):
    """Text tower: bidirectional; the last valid token is the summary.

    SigLIP pads to a fixed length and lets padding take part; that is what `text_valid` all True gives.
    Where padding is marked, it is neither attended to nor pooled.
    """

    def __init__(self, cfg: Any, out_dim: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str):
        self.max_length = cfg.max_length
        self.remat = remat
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        stddev = cfg.hidden_size**-0.5
        self.embed = Embed(cfg.vocab_size, cfg.hidden_size, stddev=_WORD_GAIN * stddev, **kwargs)
        table = jax.random.normal(rngs.params(), (cfg.max_length, cfg.hidden_size), param_dtype)
        self.pos_embed = nnx.Param(table * stddev)
        self.blocks = EncoderBlock(
            cfg.hidden_size, cfg.num_heads, cfg.mlp_dim, eps=cfg.norm_eps, stack=(cfg.num_layers,), **kwargs
        )
        self.final_norm = LayerNorm(cfg.hidden_size, eps=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.head = Linear(cfg.hidden_size, out_dim, **kwargs)

    @logical_axes.of_a_tower()
    def __call__(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """Tokens int [B, T], valid bool [B, T] (padding on the right) -> [B, E], not normalised.

        Raises:
          ValueError: T exceeds the position table.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"text of {length} tokens, but model.text_tower.max_length is {self.max_length}")
        x = self.embed(tokens)
        x = shard(x + self.pos_embed[:length].astype(x.dtype), "batch", None, "embed")
        x = run_stack(self.blocks, x, valid.astype(jnp.int32), remat=self.remat)
        last = jnp.where(valid, jnp.arange(length), 0).max(axis=1)
        x = shard(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], "batch", "embed")
        return shard(self.head(self.final_norm(x)), "batch", "embed")
