"""Attention by cuDNN's fused kernel for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

JAX does not pass segment ids to the kernel, and its causal mode alone would let packed samples attend to each
other. So it gets the whole mask, [B, 1, Lq, Lk], as a bias of 2 bytes per pair that all heads share; blocks
above the diagonal are still skipped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vilam3_jax.ops.attention.backends import MIN_KERNEL_QUERIES, AttentionCall, Support
from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.ops.attention.shards import on_devices, pad, zero_without_key

# With a mask the kernel needs even lengths.
MULTIPLE = 8
MAX_HEAD_DIM = 128


def refusal(q: Any) -> str:
    """Why the kernel does not support queries [B, Lq, H, hd] of this shape and type; empty if it does."""
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
            return Support(False, "supports only whole rows; set activation_rules.queries to ''")
        if call.automatic and call.q.shape[1] < MIN_KERNEL_QUERIES:
            return Support(False, f"is not worth it for {call.q.shape[1]} queries")
        return Support(True)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, sharded: bool) -> jax.Array:
        """See `backends.Backend`."""
        q_len, full = q.shape[1], mask.with_segment_ids(q.shape[1], k.shape[1])
        q, k, v = (pad(x, 1, x.shape[1] + -x.shape[1] % MULTIPLE) for x in (q, k, v))
        ids_q, ids_kv = pad(full.segment_ids_q, 1, q.shape[1]), pad(full.segment_ids_kv, 1, k.shape[1])
        full = dataclasses.replace(full, segment_ids_q=ids_q, segment_ids_kv=ids_kv)

        def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo) -> jax.Array:
            how: dict[str, Any] = dict(scale=1.0, is_causal=mask.causal, implementation="cudnn")
            return jax.nn.dot_product_attention(q, k, v, mask=boolean_mask(mask), **how)

        out = on_devices(local, q, k, v, full, sharded=sharded, check_vma=False)
        return zero_without_key(out[:, :q_len], mask)


CUDNN = Cudnn()


def boolean_mask(mask: MaskInfo) -> jax.Array:
    """The mask of segment ids [B or 1, Lq] and [B or 1, Lk] as bool [B or 1, 1, Lq, Lk].

    Padding, segment 0, attends to padding: for a query without a key the kernel would return NaN.
    """
    ids_q, ids_kv = mask.segment_ids_q, mask.segment_ids_kv
    assert ids_q is not None and ids_kv is not None
    allowed = ids_q[:, :, None] == ids_kv[:, None]
    if mask.causal:
        allowed &= mask.allowed(jnp.arange(ids_q.shape[1])[None], jnp.arange(ids_kv.shape[1])[None])
    return allowed[:, None]
