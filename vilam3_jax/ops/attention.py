"""Softmax attention behind one function, so that kernels can change without the models noticing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vilam3_jax import compat
from vilam3_jax.ops import partition
from vilam3_jax.ops.products import einsum

# Causal self-attention is cut into up to MAX_QUERY_BLOCKS blocks of queries, each seeing only the keys up to
# its own end: 5/8 of the multiplications and less score memory than the full square, measured in
# benchmarks/attention_cpu.py. More blocks save little more and compile longer.
MAX_QUERY_BLOCKS = 4
MIN_QUERY_BLOCK = 64
# Finite, so that a row with nothing to attend to stays finite; beside real scores its exp is an exact zero.
_MASKED = -1e30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids_q: jax.Array | None = None,
    segment_ids_kv: jax.Array | None = None,
    causal: bool = False,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Grouped-query attention with packing and causal masks; softmax in float32.

    A query attends to a key iff their segment ids are equal and not 0 and, when causal, the key's position
    is not beyond the query's. A query with no key at all (padding) gives zeros.

    In a sharded step (`partition.activation_rules`) every device attends for its own rows, heads and queries.
    Keys and values are repeated only where there are fewer key heads than parts that the heads are cut into.

    Args:
      q: [B, Lq, H, hd].
      k: [B, Lk, K, hd]; H is a multiple of K, and query head h reads key head h // (H // K).
      v: [B, Lk, K, hd].
      segment_ids_q: int [B, Lq], 0 for padding; None if every query is real.
      segment_ids_kv: int [B, Lk]; given exactly when `segment_ids_q` is.
      causal: whether to mask keys beyond the query.
      q_positions: int [B, Lq], the index that `causal` compares; by default the place in the row.
      kv_positions: int [B, Lk]; given exactly when `q_positions` is.
      scale: multiplies the scores; 1/sqrt(hd) by default.

    Returns:
      [B, Lq, H, hd] in the type of `q`.

    Raises:
      ValueError: heads do not divide (by key heads, or by the mesh), only one of a pair of arguments is
        given, or a causal call has Lq != Lk and no positions.
    """
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key heads")
    if (segment_ids_q is None) != (segment_ids_kv is None):
        raise ValueError("give segment ids of both queries and keys, or of neither")
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("give positions of both queries and keys, or of neither")
    if causal and q_positions is None and q_len != kv_len:
        raise ValueError(f"causal attention of {q_len} queries over {kv_len} keys needs positions")
    by_row_index = causal and q_positions is None
    block = q_len
    if by_row_index:
        q_positions = kv_positions = jnp.arange(q_len)[None]
        block = min(q_len, max(MIN_QUERY_BLOCK, -(-q_len // MAX_QUERY_BLOCKS)))
    block += -block % partition.ways("queries")

    def blocks(x: Any, fill: int) -> Any:
        """[B, Lq, ...] -> [B, blocks, block, ...], so that each device can have a part of every block."""
        if x is None:
            return None
        pad = -q_len % block
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return x.reshape(x.shape[0], -1, block, *x.shape[2:])

    local = partial(
        _attend_blocks,
        keys_per_block=block if by_row_index else None,
        scale=head_dim**-0.5 if scale is None else scale,
    )
    k, v = _match_heads(k, heads), _match_heads(v, heads)
    if not causal:
        q_positions = kv_positions = None
    marks = _Marks(blocks(segment_ids_q, 0), segment_ids_kv, blocks(q_positions, -1), kv_positions)
    out = _on_devices(local, blocks(q, 0), k, v, marks)
    return out.reshape(batch, -1, heads, head_dim)[:, :q_len]


def _match_heads(x: jax.Array, heads: int) -> jax.Array:
    """Repeats key heads where there are fewer than parts that the query heads are cut into."""
    ways, kv_heads = partition.ways("heads"), x.shape[2]
    repeats = math.lcm(ways, kv_heads) // kv_heads
    if heads % (kv_heads * repeats):
        raise ValueError(
            f"{heads} query and {kv_heads} key heads do not split into {ways}; set activation_rules.heads "
            "and kv_heads to None, queries to the axis that had them"
        )
    return jnp.repeat(x, repeats, axis=2) if repeats > 1 else x


class _Marks(NamedTuple):
    """Who may attend to whom: int [B or 1, n, b] for blocks of queries, [B or 1, Lk] for keys, or None."""

    segment_ids_q: Any
    segment_ids_kv: Any
    q_positions: Any
    kv_positions: Any


def _on_devices(
    local: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, marks: _Marks
) -> jax.Array:
    """Calls `local(q, k, v, marks)`; on a mesh every device with its own rows, heads and queries.

    Left to the partitioner, the reshapes inside cost some fifty small collectives a layer and direction.
    """
    placed = partition.placement()
    if placed is None:
        return local(q, k, v, marks)
    mesh, spec = placed

    def rows(x: jax.Array | None, *axes: str | None) -> Any:
        # Positions may be the same for all rows: [1, ...].
        return None if x is None else spec("batch" if x.shape[0] == q.shape[0] else None, *axes)

    out = rows(q, None, "queries", "heads", None)
    keys = rows(k, None, "heads", None)
    marked = _Marks(
        rows(marks.segment_ids_q, None, "queries"),
        rows(marks.segment_ids_kv, None),
        rows(marks.q_positions, None, "queries"),
        rows(marks.kv_positions, None),
    )
    return jax.shard_map(local, mesh=mesh, in_specs=(out, keys, keys, marked), out_specs=out)(q, k, v, marks)


def _attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    marks: _Marks,
    *,
    keys_per_block: int | None,
    scale: float,
) -> jax.Array:
    """One device's share: queries [B, n, b, H, hd] in n blocks -> the same shape.

    Block i sees the first (i + 1) * `keys_per_block` keys, or all of them if that is None; b is less than
    `keys_per_block` where devices share a block.
    """
    batch, count, length, _, head_dim = q.shape
    kv_heads = k.shape[2]
    # [n, B, K, G * b, hd]: the queries of all heads that read one key head are rows of one matrix product.
    rows = q.reshape(batch, count, length, kv_heads, -1, head_dim).transpose(1, 0, 3, 4, 2, 5)
    rows = rows.reshape(count, batch, kv_heads, -1, head_dim) * jnp.asarray(scale, q.dtype)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out: Any = _attend(*compat.equally_varying(rows, k, v), marks, keys_per_block)
    out = out.reshape(count, batch, kv_heads, -1, length, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, marks: _Marks, keys_per_block: int | None) -> jax.Array:
    """Queries, already scaled, [n, B, K, G * b, hd], k and v [B, K, Lk, hd] -> like the queries.

    Scores are computed again for the gradient (arXiv:2205.14135): kept, they would be the largest thing a
    step holds.
    """
    return _attend_forward(q, k, v, marks, keys_per_block)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, marks: _Marks, keys_per_block: int | None
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


def _mask(i: int, seen: int, rows: jax.Array, marks: _Marks) -> jax.Array | None:
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
