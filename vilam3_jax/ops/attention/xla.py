"""Attention by XLA, for every platform: short rows in a few blocks of queries, long rows by `blockwise`."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vilam3_jax.ops.attention import blockwise
from vilam3_jax.ops.attention.backends import AttentionCall, Support
from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.ops.attention.shards import on_devices
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.matmul import einsum

# Causal self-attention is cut into up to MAX_QUERY_BLOCKS blocks of queries, each with the keys up to its own
# end: 5/8 of the multiplications and less memory for scores than the full square, measured in
# benchmarks/attention_cpu.py. More blocks save little and compile longer.
MAX_QUERY_BLOCKS = 4
MIN_QUERY_BLOCK = 64
# Longer rows go blockwise: their scores would be the largest array of a step.
MAX_SHORT = 1024
# Finite, so that a row without any key stays finite; its exp is exactly 0 next to real scores.
_MASKED = -1e30


class Xla:
    """Attention by XLA's products, for every platform and call."""

    name = "xla"

    def supports(self, call: AttentionCall) -> Support:
        """See `backends.Backend`."""
        return Support(True)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, sharded: bool) -> jax.Array:
        """See `backends.Backend`."""
        q_len, by_row_index = q.shape[1], mask.causal and mask.q_positions is None
        shards = logical_axes.axis_size("queries") if sharded else 1
        if q_len > MAX_SHORT:
            mask = mask.with_segment_ids(q_len, k.shape[1]).with_positions(q_len, k.shape[1])
            block = blockwise.BLOCK + -blockwise.BLOCK % shards
            local: Any = blockwise.attend
        else:
            block = min(q_len, max(MIN_QUERY_BLOCK, -(-q_len // MAX_QUERY_BLOCKS))) if by_row_index else q_len
            block += -block % shards
            if mask.causal:
                mask = mask.with_positions(q_len, k.shape[1])
            else:
                mask = dataclasses.replace(mask, q_positions=None, kv_positions=None)
            local = partial(attend_blocks, keys_per_block=block if by_row_index else None)
        return on_devices(local, q, k, v, mask, sharded=sharded, block=block)


XLA = Xla()


def attend_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, *, keys_per_block: int | None
) -> jax.Array:
    """One device's part: scaled queries [B, n, b, H, hd] in n blocks -> the same shape.

    Block i attends to keys before (i + 1) * `keys_per_block`, or to all if that is None; b is less than
    `keys_per_block` if devices share a block.
    """
    batch, count, length, _, head_dim = q.shape
    kv_heads = k.shape[2]
    # [n, B, K, G * b, hd]: the queries of all heads that read one key head are rows of one matrix product.
    rows = q.reshape(batch, count, length, kv_heads, -1, head_dim).transpose(1, 0, 3, 4, 2, 5)
    rows = rows.reshape(count, batch, kv_heads, -1, head_dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out: Any = _attend(*compat.equally_varying(rows, k, v), mask, keys_per_block)
    out = out.reshape(count, batch, kv_heads, -1, length, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, keys_per_block: int | None
) -> jax.Array:
    """Scaled queries [n, B, K, G * b, hd], k and v [B, K, Lk, hd] -> like the queries.

    Scores are recomputed for the gradient (arXiv:2205.14135): saved, they would be the largest array of a
    step.
    """
    return _attend_forward(q, k, v, mask, keys_per_block)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, keys_per_block: int | None
) -> tuple[Any, Any]:
    outputs, log_totals = [], []
    for i, rows in enumerate(q):
        seen = _keys_of_block(i, k, mask, keys_per_block)
        scores = einsum("bknd,bksd->bkns", rows, k[:, :, seen], jnp.float32)
        allowed = _allowed(i, seen, rows, mask)
        if allowed is not None:
            scores = jnp.where(allowed, scores, _MASKED)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        out = einsum("bkns,bksd->bknd", weights.astype(v.dtype), v[:, :, seen], jnp.float32)
        # Dividing the [b, hd] result costs less than dividing the [b, Lk] weights.
        outputs.append(jnp.where(peak > _MASKED, out / total, 0.0).astype(q.dtype))
        # A query without any key: exp(score - log_total) is 0 for all.
        log_totals.append(jnp.where(peak > _MASKED, peak + jnp.log(total), -_MASKED))
    out, log_total = jnp.stack(outputs), jnp.stack(log_totals)
    return out, (q, k, v, mask, out, log_total)


def _attend_backward(keys_per_block: int | None, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, mask, out, log_total = kept
    # The derivative of the softmax subtracts sum(weights * d_weights), which is this.
    mean = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    d_q = []
    d_k, d_v = jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    for i, rows in enumerate(q):
        seen = _keys_of_block(i, k, mask, keys_per_block)
        keys, values = k[:, :, seen], v[:, :, seen]
        # As [keys, queries], only the last product transposes an array of this size.
        scores = einsum("bksd,bknd->bksn", keys, rows, jnp.float32)
        allowed = _allowed(i, seen, rows, mask)
        if allowed is not None:
            scores = jnp.where(allowed.mT, scores, _MASKED)
        weights = jnp.exp(scores - log_total[i].mT)
        d_weights = einsum("bksd,bknd->bksn", values, d_out[i], jnp.float32)
        d_scores = (weights * (d_weights - mean[i].mT)).astype(q.dtype)
        d_v = d_v.at[:, :, seen].add(
            einsum("bksn,bknd->bksd", weights.astype(v.dtype), d_out[i], jnp.float32)
        )
        d_k = d_k.at[:, :, seen].add(einsum("bksn,bknd->bksd", d_scores, rows, jnp.float32))
        d_q.append(einsum("bksn,bksd->bknd", d_scores, keys, jnp.float32).astype(q.dtype))
    return jnp.stack(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _keys_of_block(i: int, k: jax.Array, mask: MaskInfo, keys_per_block: int | None) -> slice:
    """The keys that queries of block i may attend to."""
    if keys_per_block is None:
        return slice(0, k.shape[2])
    first = 0 if mask.window is None else max(0, i * keys_per_block - mask.window + 1)
    return slice(first, min((i + 1) * keys_per_block, k.shape[2]))


def _allowed(i: int, seen: slice, rows: jax.Array, mask: MaskInfo) -> jax.Array | None:
    """Bool [B or 1, 1, G * b, seen]: which keys the rows of block i may attend to; None for all."""
    allowed = None
    if mask.segment_ids_q is not None and mask.segment_ids_kv is not None:
        own, theirs = mask.segment_ids_q[:, i, :, None], mask.segment_ids_kv[:, None, seen]
        allowed = (own == theirs) & (own != 0)
    if mask.q_positions is not None and mask.kv_positions is not None:
        ordered = mask.allowed(mask.q_positions[:, i], mask.kv_positions[:, seen])
        allowed = ordered if allowed is None else allowed & ordered
    if allowed is None:
        return None
    return jnp.tile(allowed, (1, rows.shape[2] // allowed.shape[1], 1))[:, None]
