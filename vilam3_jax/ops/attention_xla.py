"""Attention by XLA's own products, for every platform: short rows by whole blocks of queries."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vilam3_jax.runtime import compat
from vilam3_jax.sharding.matmul import einsum

# Causal self-attention is cut into up to MAX_QUERY_BLOCKS blocks of queries, each seeing only the keys up to
# its own end: 5/8 of the multiplications and less score memory than the full square, measured in
# benchmarks/attention_cpu.py. More blocks save little more and compile longer.
MAX_QUERY_BLOCKS = 4
MIN_QUERY_BLOCK = 64
# Finite, so that a row with nothing to attend to stays finite; beside real scores its exp is an exact zero.
_MASKED = -1e30


class Marks(NamedTuple):
    """Who may attend to whom: int [B or 1, n, b] for blocks of queries, [B or 1, Lk] for keys, or None."""

    segment_ids_q: Any
    segment_ids_kv: Any
    q_positions: Any
    kv_positions: Any


def attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    marks: Marks,
    *,
    keys_per_block: int | None,
) -> jax.Array:
    """One device's share: scaled queries [B, n, b, H, hd] in n blocks -> the same shape.

    Block i sees the first (i + 1) * `keys_per_block` keys, or all of them if that is None; b is less than
    `keys_per_block` where devices share a block.
    """
    batch, count, length, _, head_dim = q.shape
    kv_heads = k.shape[2]
    # [n, B, K, G * b, hd]: the queries of all heads that read one key head are rows of one matrix product.
    rows = q.reshape(batch, count, length, kv_heads, -1, head_dim).transpose(1, 0, 3, 4, 2, 5)
    rows = rows.reshape(count, batch, kv_heads, -1, head_dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out: Any = _attend(*compat.equally_varying(rows, k, v), marks, keys_per_block)
    out = out.reshape(count, batch, kv_heads, -1, length, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, keys_per_block: int | None) -> jax.Array:
    """Queries, already scaled, [n, B, K, G * b, hd], k and v [B, K, Lk, hd] -> like the queries.

    Scores are computed again for the gradient (arXiv:2205.14135): kept, they would be the largest thing a
    step holds.
    """
    return _attend_forward(q, k, v, marks, keys_per_block)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, keys_per_block: int | None
) -> tuple[Any, Any]:
    outputs, log_totals = [], []
    for i, rows in enumerate(q):
        seen = _seen(i, k, keys_per_block)
        scores = einsum("bknd,bksd->bkns", rows, k[:, :, :seen], jnp.float32)
        mask = _mask(i, seen, rows, marks)
        if mask is not None:
            scores = jnp.where(mask, scores, _MASKED)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        out = einsum("bkns,bksd->bknd", weights.astype(v.dtype), v[:, :, :seen], jnp.float32)
        # Dividing the [b, hd] result costs less than dividing the [b, Lk] weights.
        outputs.append(jnp.where(peak > _MASKED, out / total, 0.0).astype(q.dtype))
        # A query without any key: exp(score - log_total) is 0 for all.
        log_totals.append(jnp.where(peak > _MASKED, peak + jnp.log(total), -_MASKED))
    out, log_total = jnp.stack(outputs), jnp.stack(log_totals)
    return out, (q, k, v, marks, out, log_total)


def _attend_backward(keys_per_block: int | None, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, marks, out, log_total = kept
    # The derivative of the softmax subtracts sum(weights * d_weights), which is this.
    mean = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    d_q = []
    d_k, d_v = jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    for i, rows in enumerate(q):
        seen = _seen(i, k, keys_per_block)
        keys, values = k[:, :, :seen], v[:, :, :seen]
        # [keys, queries]: so only the last product has to turn an array of this size.
        scores = einsum("bksd,bknd->bksn", keys, rows, jnp.float32)
        mask = _mask(i, seen, rows, marks)
        if mask is not None:
            scores = jnp.where(mask.mT, scores, _MASKED)
        weights = jnp.exp(scores - log_total[i].mT)
        d_weights = einsum("bksd,bknd->bksn", values, d_out[i], jnp.float32)
        d_scores = (weights * (d_weights - mean[i].mT)).astype(q.dtype)
        d_v = d_v.at[:, :, :seen].add(
            einsum("bksn,bknd->bksd", weights.astype(v.dtype), d_out[i], jnp.float32)
        )
        d_k = d_k.at[:, :, :seen].add(einsum("bksn,bknd->bksd", d_scores, rows, jnp.float32))
        d_q.append(einsum("bksn,bksd->bknd", d_scores, keys, jnp.float32).astype(q.dtype))
    return jnp.stack(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _seen(i: int, k: jax.Array, keys_per_block: int | None) -> int:
    """How many keys the queries of block i may see at most."""
    return k.shape[2] if keys_per_block is None else min((i + 1) * keys_per_block, k.shape[2])


def _mask(i: int, seen: int, rows: jax.Array, marks: Marks) -> jax.Array | None:
    """Bool [B or 1, 1, G * b, seen], True where rows of block i may look; None if they may everywhere."""
    mask = None
    if marks.segment_ids_q is not None and marks.segment_ids_kv is not None:
        own, theirs = marks.segment_ids_q[:, i, :, None], marks.segment_ids_kv[:, None, :seen]
        mask = (own == theirs) & (own != 0)
    if marks.q_positions is not None and marks.kv_positions is not None:
        ordered = marks.q_positions[:, i, :, None] >= marks.kv_positions[:, None, :seen]
        mask = ordered if mask is None else mask & ordered
    if mask is None:
        return None
    return jnp.tile(mask, (1, rows.shape[2] // mask.shape[1], 1))[:, None]
