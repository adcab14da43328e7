"""Softmax attention behind one function, so that kernels can change without the models noticing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Causal self-attention is cut into up to MAX_QUERY_BLOCKS blocks of queries, each seeing only the keys up to
# its own end: 9/16 of the multiplications and less score memory than the full square.
# benchmarks/attention_cpu.py measures it.
MAX_QUERY_BLOCKS = 8
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
    is not beyond the query's. A query with no key at all (padding) gives zeros. Keys and values are never
    repeated over the query heads.

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
      ValueError: heads do not divide, only one of a pair of arguments is given, or a causal call has Lq !=
        Lk and no positions.
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
    scale = head_dim**-0.5 if scale is None else scale

    groups = heads // kv_heads
    # [B, K, G, L, hd]: the query heads of one key head become rows of one matrix product.
    q = (
        (q * jnp.asarray(scale, q.dtype))
        .reshape(batch, q_len, kv_heads, groups, head_dim)
        .transpose(0, 2, 3, 1, 4)
    )
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)

    by_row_index = causal and q_positions is None
    block = max(MIN_QUERY_BLOCK, -(-q_len // MAX_QUERY_BLOCKS)) if by_row_index else q_len
    # Scores are computed again for the gradient: kept, they would be the largest thing a step holds.
    attend = jax.checkpoint(_attend) if by_row_index else _attend
    outputs = []
    for start in range(0, q_len, block):
        stop = min(start + block, q_len)
        seen = stop if by_row_index else kv_len
        mask = _mask(
            None if segment_ids_q is None else segment_ids_q[:, start:stop],
            None if segment_ids_kv is None else segment_ids_kv[:, :seen],
            _row_positions(q_positions, start, stop) if causal else None,
            _row_positions(kv_positions, 0, seen) if causal else None,
        )
        outputs.append(attend(q[:, :, :, start:stop], k[:, :, :seen], v[:, :, :seen], mask))
    out = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, q_len, heads, head_dim)


def _row_positions(positions: jax.Array | None, start: int, stop: int) -> jax.Array:
    return jnp.arange(start, stop)[None] if positions is None else positions


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
