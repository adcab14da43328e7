"""Softmax attention: one function for the models, several backends."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vilam3_jax.ops.attention import backends, cached, cudnn, splash, xla
from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.ops.attention.sequence_parallel import AXIS, attend_over_shards
from vilam3_jax.ops.attention.shards import match_heads
from vilam3_jax.sharding import logical_axes

__all__ = ["MaskInfo", "attention", "cached_attention", "row_length"]

# Largest padding of a tower's rows, see `row_length`: SigLIP's 729 tokens become 768; InternViT's 1,025 would
# become 1,536.
MAX_ROW_PADDING = 1 / 16

# The last one registered is tried first.
for _backend in (xla.XLA, cudnn.CUDNN, splash.SPLASH):
    backends.register(_backend)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, *, scale: float | None = None
) -> jax.Array:
    """Grouped-query attention with packing, causal and window masks; softmax in float32.

    In a sharded step (`logical_axes.activation_rules`) every device computes its own rows, heads and queries.
    Keys and values are repeated if there are fewer key heads than shards of the heads. `backends.select`
    chooses the backend.

    Args:
      q: [B, Lq, H, hd].
      k: [B, Lk, K, hd]; H is a multiple of K, and query head h reads key head h // (H // K).
      v: [B, Lk, K, hd].
      mask: which keys a query attends to.
      scale: multiplies the scores; 1/sqrt(hd) by default.

    Returns:
      [B, Lq, H, hd] in the type of `q`.

    Raises:
      ValueError: heads are not divisible by key heads, or the mask is inconsistent.
      UserError: the backend that the config names does not support the call.
    """
    heads = q.shape[2]
    if heads % k.shape[2]:
        raise ValueError(f"{heads} query heads are not a multiple of {k.shape[2]} key heads")
    mask.check(q.shape[1], k.shape[1])
    q = _scaled(q, scale)
    if logical_axes.axis_size(AXIS) > 1:
        return attend_over_shards(q, k, v, mask)
    shards = logical_axes.axis_size("heads")
    k, v = match_heads(k, heads, shards), match_heads(v, heads, shards)
    backend = backends.select(backends.call_of(q, k.shape[1], mask, sharded=True))
    return backend(q, k, v, mask, sharded=True)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, slots: jax.Array, *,
    window: int | None, scale: float | None = None,
) -> jax.Array | None:  # fmt: skip
    """Attention of single queries to one layer of a stacked cache; None if there is no kernel for the call.

    See `cached.attend`; `q` is not scaled yet.
    """
    if not cached.supports(q, k):
        return None
    return cached.attend(_scaled(q, scale), k, v, layer, slots, window)


def _scaled(q: jax.Array, scale: float | None) -> jax.Array:
    # In float32: 1/sqrt(hd) is rarely exact in the type of the queries.
    return (q.astype(jnp.float32) * (q.shape[-1] ** -0.5 if scale is None else scale)).astype(q.dtype)


def row_length(tokens: int) -> int:
    """The length to which a tower should pad its rows of `tokens`.

    The splash kernel pads rows in every layer and direction. Padding the tower's input once is cheaper if it
    adds little to the other products.
    """
    choice, automatic = backends.choice(), (backends.AUTO, backends.RING)
    kernel = choice == "splash" or (choice in automatic and logical_axes.platform() == "tpu")
    padded = splash.padded(tokens)
    worth = tokens >= backends.MIN_KERNEL_QUERIES and padded - tokens <= MAX_ROW_PADDING * tokens
    return padded if kernel and worth else tokens
