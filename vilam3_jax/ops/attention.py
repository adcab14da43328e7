"""Softmax attention behind one function, so that kernels can change without the models noticing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vilam3_jax.ops import partition

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
    batch, count, length, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    # [n, B, K, G, b, hd]: the query heads of one key head become rows of one matrix product.
    q = q * jnp.asarray(scale, q.dtype)
    q = q.reshape(batch, count, length, kv_heads, -1, head_dim).transpose(1, 0, 3, 4, 2, 5)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    # Scores are computed again for the gradient: kept, they would be the largest thing a step holds.
    attend = _attend if keys_per_block is None else jax.checkpoint(_attend)
    outputs = []
    for i in range(count):
        seen = kv_len if keys_per_block is None else min((i + 1) * keys_per_block, kv_len)
        mask = _mask(
            None if marks.segment_ids_q is None else marks.segment_ids_q[:, i],
            None if marks.segment_ids_kv is None else marks.segment_ids_kv[:, :seen],
            None if marks.q_positions is None else marks.q_positions[:, i],
            None if marks.kv_positions is None else marks.kv_positions[:, :seen],
        )
        outputs.append(attend(q[i], k[:, :, :seen], v[:, :, :seen], mask))
    return jnp.stack(outputs).transpose(1, 0, 4, 2, 3, 5).reshape(batch, count, length, heads, head_dim)


def _mask(
    segment_ids_q: jax.Array | None,
    segment_ids_kv: jax.Array | None,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
) -> jax.Array | None:
    """Returns bool [B or 1, Lq, Lk], True where attention is allowed; None if it is allowed everywhere."""
    mask = None
    if segment_ids_q is not None and segment_ids_kv is not None:
        same = segment_ids_q[:, :, None] == segment_ids_kv[:, None, :]
        mask = same & (segment_ids_q != 0)[:, :, None]
    if q_positions is not None and kv_positions is not None:
        ordered = q_positions[:, :, None] >= kv_positions[:, None, :]
        mask = ordered if mask is None else mask & ordered
    return mask


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """q [B, K, G, Lq, hd], k and v [B, K, Lk, hd], mask [B or 1, Lq, Lk] -> [B, K, G, Lq, hd]."""
    batch, kv_heads, groups, q_len, head_dim = q.shape
    rows = q.reshape(batch, kv_heads, groups * q_len, head_dim)
    scores = jnp.einsum("bknd,bksd->bkns", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, q_len, -1)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    # Dividing the [Lq, hd] result costs less than dividing the [Lq, Lk] weights.
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, groups * q_len, -1)
    out = jnp.einsum("bkns,bksd->bknd", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, groups, q_len, head_dim) / total
    if mask is not None:
        out = jnp.where(mask.any(axis=-1)[:, None, None, :, None], out, 0.0)
    return out.astype(q.dtype)
