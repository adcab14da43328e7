"""Attention by cuDNN's fused kernel for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

JAX passes no segment ids to that kernel, and its causal mode alone would let packed samples see each other.
So it always gets the whole mask, [B, 1, Lq, Lk], as a bias of 2 bytes per pair, shared by all heads. Blocks
above the diagonal are still skipped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vilam3_jax.ops.attention.backends import MIN_KERNEL_QUERIES, AttentionCall, Support
from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.ops.attention.shards import on_devices, pad, to_blocks, zero_without_key

# With a mask the kernel needs even lengths.
MULTIPLE = 8
MAX_HEAD_DIM = 128


def refusal(q: Any) -> str:
    """Why the kernel cannot take queries [B, Lq, H, hd] of this shape and type; empty if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {q.dtype}; set model.dtype"
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM:
        return f"needs a head size up to {MAX_HEAD_DIM} that is a multiple of 8, not {q.shape[3]}"
    return ""


class Cudnn:
    """cuDNN's fused kernel."""

    name = "cudnn"

    def supports(self, call: AttentionCall) -> Support:
        """On GPUs, for whole rows of a supported type and head size."""
        if call.platform != "gpu":
            return Support(False, f"is a kernel for NVIDIA GPUs, and the devices are {call.platform}")
        if reason := refusal(call.q):
            return Support(False, reason)
        if call.query_shards > 1:
            return Support(False, "takes whole rows; set activation_rules.queries to ''")
        if call.automatic and call.q.shape[1] < MIN_KERNEL_QUERIES:
            return Support(False, f"is not worth it for {call.q.shape[1]} queries")
        return Support(True)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, sharded: bool) -> jax.Array:
        """See `backends.Backend`."""
        batch, q_len, heads, head_dim = q.shape
        full = mask.with_segment_ids(q_len, k.shape[1])
        kv_len = k.shape[1] + -k.shape[1] % MULTIPLE
        k, v, ids_kv = (pad(x, 1, kv_len) for x in (k, v, full.segment_ids_kv))
        block = q_len + -q_len % MULTIPLE

        def local(q: jax.Array, k: jax.Array, v: jax.Array, blocked: Any) -> jax.Array:
            row = dataclasses.replace(blocked, segment_ids_q=blocked.segment_ids_q[:, 0])
            return attend(q[:, 0], k, v, row)[:, None]

        blocked = dataclasses.replace(
            full, segment_ids_q=to_blocks(full.segment_ids_q, block), segment_ids_kv=ids_kv
        )
        out = on_devices(local, to_blocks(q, block), k, v, blocked, sharded=sharded, check_vma=False)
        return zero_without_key(out.reshape(batch, -1, heads, head_dim)[:, :q_len], mask)


CUDNN = Cudnn()


def boolean_mask(mask: MaskInfo) -> jax.Array:
    """The mask of segment ids [B or 1, Lq] and [B or 1, Lk] as bool [B or 1, 1, Lq, Lk].

    Padding, segment 0, sees padding: for a query without a key the kernel would give NaN.
    """
    ids_q, ids_kv = mask.segment_ids_q, mask.segment_ids_kv
    assert ids_q is not None and ids_kv is not None
    allowed = ids_q[:, :, None] == ids_kv[:, None]
    if mask.causal:
        allowed &= mask.allowed(jnp.arange(ids_q.shape[1])[None], jnp.arange(ids_kv.shape[1])[None])
    return allowed[:, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo) -> jax.Array:
    """One device's share.

    Args:
      q: [B, Lq, H, hd], scaled, bfloat16 or float16; Lq and Lk are multiples of `MULTIPLE`.
      k: [B, Lk, K, hd].
      v: [B, Lk, K, hd].
      mask: with segment ids. The output of padding is meaningless.

    Returns:
      As `q`.
    """
    allowed = boolean_mask(mask)
    return jax.nn.dot_product_attention(
        q, k, v, mask=allowed, scale=1.0, is_causal=mask.causal, implementation="cudnn"
    )
