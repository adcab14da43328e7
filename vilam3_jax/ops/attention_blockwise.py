"""Attention of long rows by XLA: blocks of queries meet blocks of keys one pair at a time, on one device or
around a ring of devices that each hold a part of the row.

The softmax is kept up to date as blocks of keys come by (arXiv:2112.05682), scores are computed again for the
gradient, and around a ring the keys travel (arXiv:2310.01889): nothing is as large as [L, L]. Pairs of
blocks that a causal mask or packing separates are not computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vilam3_jax.runtime import compat
from vilam3_jax.sharding.matmul import einsum

BLOCK = 512
# Finite, so that arithmetic with it is; less than any score.
_MASKED = -1e30
_LATEST = jnp.iinfo(jnp.int32).max


class _Marks(NamedTuple):
    """Segment ids and positions, int32: of blocks of queries [n, B or 1, b], of keys [m, B or 1, s]."""

    segment_ids_q: jax.Array
    segment_ids_kv: jax.Array
    q_positions: jax.Array
    kv_positions: jax.Array


class Ring(NamedTuple):
    """Mesh axis over which a row's parts lie, and its size."""

    axis: str
    size: int


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    marks: tuple[jax.Array, ...],
    *,
    causal: bool,
    ring: Ring | None = None,
) -> jax.Array:
    """One device's share.

    Args:
      q: [B, n, b, H, hd], scaled queries in n blocks.
      k: [B, Lk, K, hd].
      v: [B, Lk, K, hd].
      marks: segment ids of queries, int [B or 1, n, b], and keys [B or 1, Lk]; positions alike.
      causal: whether to mask keys at positions beyond the query's.
      ring: inside `shard_map`, the axis over which keys lie; None if all are here.

    Returns:
      As `q`.
    """
    batch, count, length, _, head_dim = q.shape
    ids_q, ids_kv, q_positions, kv_positions = marks
    kv_heads, block = k.shape[2], min(BLOCK, k.shape[1])

    def keys(x: jax.Array) -> jax.Array:
        """[B, Lk, ...] -> [m, B, block, ...]; padding has segment id 0."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    # [n, B, K, G, b, hd] and [m, B, K, s, hd].
    rows = q.reshape(batch, count, length, kv_heads, -1, head_dim).transpose(1, 0, 3, 4, 2, 5)
    k, v = (keys(x).swapaxes(2, 3) for x in (k, v))
    by_block = _Marks(ids_q.swapaxes(0, 1), keys(ids_kv), q_positions.swapaxes(0, 1), keys(kv_positions))
    out: Any = _attend(*compat.equally_varying(rows, k, v), by_block, causal, ring)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape)


def balance(x: jax.Array, ring: Ring) -> jax.Array:
    """Deals a row's parts out anew, so that under a causal mask all devices have equal work.

    Of twice as many parts as devices, each device gets one from the front and its mirror image from the back.

    Args:
      x: [B, L / size, ...], contiguous parts along the ring; an even number of places.
      ring: axis of the `shard_map` around it.
    """
    return _deal(x, ring, back=False)


def restore(x: jax.Array, ring: Ring) -> jax.Array:
    """Undoes `balance`."""
    return _deal(x, ring, back=True)


def _deal(x: jax.Array, ring: Ring, back: bool) -> jax.Array:
    def owner(part: int) -> int:
        return min(part, 2 * ring.size - 1 - part)

    moved = []
    for half, piece in enumerate(jnp.split(x, 2, axis=1)):
        pairs = [(i, owner(2 * i + half)) for i in range(ring.size)]
        moved.append(jax.lax.ppermute(piece, ring.axis, [pair[::-1] for pair in pairs] if back else pairs))
    return jnp.concatenate(moved, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, marks: _Marks, causal: bool, ring: Ring | None
) -> jax.Array:
    """Queries [n, B, K, G, b, hd], k and v [m, B, K, s, hd] -> like the queries."""
    return _attend_forward(q, k, v, marks, causal, ring)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, marks: _Marks, causal: bool, ring: Ring | None
) -> tuple[Any, Any]:
    like = q[..., :1].astype(jnp.float32)
    state = _State(jnp.full_like(like, _MASKED), jnp.zeros_like(like), jnp.zeros_like(q, jnp.float32))
    # The state varies over the same mesh axes as what is added to it.
    _, *state = compat.equally_varying(q, *state)

    def meet(state: _State, keys: _Keys) -> _State:
        return _visit_forward(q, marks, keys, state, causal)

    keys = _Keys(k, v, marks.segment_ids_kv, marks.kv_positions)
    if ring is not None:

        def step(carry: tuple[_State, _Keys], _: None) -> tuple[tuple[_State, _Keys], None]:
            state, keys = carry
            return (meet(state, keys), _pass_on(keys, ring)), None

        keys = _Keys(*compat.equally_varying(*keys))
        (state, keys), _ = jax.lax.scan(step, (_State(*state), keys), None, ring.size - 1)
    peak, total, sums = meet(_State(*state), keys)
    seen = total > 0
    out = jnp.where(seen, sums / jnp.where(seen, total, 1.0), 0.0).astype(q.dtype)
    # A query without any key: exp(score - log_total) is 0 for all.
    log_total = jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1.0)), -_MASKED)
    return out, (q, k, v, marks, out, log_total)


def _attend_backward(causal: bool, ring: Ring | None, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, marks, out, log_total = kept
    # The derivative of the softmax subtracts sum(weights * d_weights), which is this.
    mean = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    gradients = (jnp.zeros_like(x, jnp.float32) for x in (q, k, v))
    _, d_q, d_k, d_v = compat.equally_varying(q, *gradients)

    def meet(keys: _Keys, d_q: jax.Array, d_k: jax.Array, d_v: jax.Array) -> tuple[jax.Array, ...]:
        return _visit_backward(q, marks, keys, (d_out, log_total, mean), (d_q, d_k, d_v), causal)

    keys = _Keys(k, v, marks.segment_ids_kv, marks.kv_positions)
    if ring is not None:
        # The gradients of keys travel with them, and are home after as many steps as there are devices.
        def step(carry: Any, _: None) -> tuple[Any, None]:
            keys, d_q, d_k, d_v = carry
            d_q, d_k, d_v = meet(keys, d_q, d_k, d_v)
            return (_pass_on(keys, ring), d_q, *_pass_on((d_k, d_v), ring)), None

        keys = _Keys(*compat.equally_varying(*keys))
        (keys, d_q, d_k, d_v), _ = jax.lax.scan(step, (keys, d_q, d_k, d_v), None, ring.size - 1)
    d_q, d_k, d_v = meet(keys, d_q, d_k, d_v)
    if ring is not None:
        d_k, d_v = _pass_on((d_k, d_v), ring)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


class _Keys(NamedTuple):
    """A device's blocks of keys, or those that travelled to it."""

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


class _State(NamedTuple):
    """Of the keys seen so far, float32: highest score and sum of weights [..., 1], weighted sum [..., hd]."""

    peak: jax.Array
    total: jax.Array
    sums: jax.Array


def _pass_on(values: Any, ring: Ring) -> Any:
    to_next = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, to_next), values)


def _visit_forward(q: jax.Array, marks: _Marks, keys: _Keys, state: _State, causal: bool) -> _State:
    """Lets all blocks of queries see all blocks of `keys`."""

    def queries(block: Any) -> _State:
        q, ids, positions, state, needed = block

        def see(state: _State, keys: _Keys) -> _State:
            mask = _mask(ids, positions, keys, causal)
            scores = jnp.where(mask, einsum("bkgnd,bksd->bkgns", q, keys.k, jnp.float32), _MASKED)
            peak = jnp.maximum(state.peak, scores.max(axis=-1, keepdims=True))
            # A query that has seen no key yet: its weights must be 0, and exp(_MASKED - _MASKED) is not.
            base = jnp.where(peak > _MASKED, peak, 0.0)
            weights, fade = jnp.exp(scores - base), jnp.exp(state.peak - base)
            sums = einsum("bkgns,bksd->bkgnd", weights.astype(q.dtype), keys.v, jnp.float32)
            total = state.total * fade + weights.sum(axis=-1, keepdims=True)
            return _State(peak, total, state.sums * fade + sums)

        def step(state: _State, key_block: tuple[_Keys, jax.Array]) -> tuple[_State, None]:
            keys, needed = key_block
            return jax.lax.cond(needed, see, lambda state, _: state, state, keys), None

        return jax.lax.scan(step, state, (keys, needed))[0]

    needed = _needed(marks, keys, causal)
    return jax.lax.map(queries, (q, marks.segment_ids_q, marks.q_positions, state, needed))


def _visit_backward(
    q: jax.Array,
    marks: _Marks,
    keys: _Keys,
    of_queries: tuple[jax.Array, jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array, jax.Array],
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds to the gradients of queries, keys and values what all pairs of blocks give.

    Args:
      q: [n, B, K, G, b, hd].
      marks: of the queries; those of keys are with `keys`.
      keys: m blocks.
      of_queries: gradient of the output, log of the sum of weights, mean gradient of the weights.
      gradients: float32, as q, k and v.
      causal: see `attend`.
    """

    def queries(carry: Any, block: Any) -> tuple[Any, jax.Array]:
        q, ids, positions, (d_out, log_total, mean), d_q, needed = block

        def see(keys: _Keys) -> tuple[jax.Array, jax.Array, jax.Array]:
            mask = _mask(ids, positions, keys, causal)
            scores = jnp.where(mask, einsum("bkgnd,bksd->bkgns", q, keys.k, jnp.float32), _MASKED)
            weights = jnp.exp(scores - log_total)
            d_weights = einsum("bkgnd,bksd->bkgns", d_out, keys.v, jnp.float32)
            d_scores = (weights * (d_weights - mean)).astype(q.dtype)
            return (
                einsum("bkgns,bksd->bkgnd", d_scores, keys.k, jnp.float32),
                _over_groups(d_scores, q),
                _over_groups(weights.astype(q.dtype), d_out),
            )

        def step(carry: Any, key_block: Any) -> tuple[Any, None]:
            d_q, d_k, d_v = carry
            index, keys, needed = key_block
            nothing = compat.equally_varying(q, *(jnp.zeros_like(x, jnp.float32) for x in (q, *keys[:2])))[1:]
            more = jax.lax.cond(needed, see, lambda _: nothing, keys)
            return (d_q + more[0], d_k.at[index].add(more[1]), d_v.at[index].add(more[2])), None

        index = jnp.arange(keys.k.shape[0])
        (d_q, *carry), _ = jax.lax.scan(step, (d_q, *carry), (index, keys, needed))
        return tuple(carry), d_q

    d_q, d_k, d_v = gradients
    needed = _needed(marks, keys, causal)
    blocks = (q, marks.segment_ids_q, marks.q_positions, of_queries, d_q, needed)
    (d_k, d_v), d_q = jax.lax.scan(queries, (d_k, d_v), blocks)
    return d_q, d_k, d_v


def _over_groups(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Weights [B, K, G, b, s] and x [B, K, G, b, hd] -> [B, K, s, hd], summed over a head's queries."""
    shape = (*x.shape[:2], -1)
    return einsum(
        "bkns,bknd->bksd",
        weights.reshape(*shape, weights.shape[-1]),
        x.reshape(*shape, x.shape[-1]),
        jnp.float32,
    )


def _mask(ids: jax.Array, positions: jax.Array, keys: _Keys, causal: bool) -> jax.Array:
    """Bool [B or 1, 1, 1, b, s], True where a query may look."""
    mask = (ids[:, :, None] == keys.segment_ids[:, None]) & (ids != 0)[:, :, None]
    if causal:
        mask &= positions[:, :, None] >= keys.positions[:, None]
    return mask[:, None, None]


def _needed(marks: _Marks, keys: _Keys, causal: bool) -> jax.Array:
    """Bool [n, m]: False where no query of a block can see any key of the other, in any row.

    Segments are compared by their lowest and highest id: packers number them in order.
    """

    def span(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(ids == 0, _LATEST, ids).min(axis=-1), ids.max(axis=-1)

    (low_q, high_q), (low_kv, high_kv) = span(marks.segment_ids_q), span(keys.segment_ids)
    needed = (low_q[:, None] <= high_kv) & (low_kv <= high_q[:, None])
    if causal:
        real = keys.segment_ids != 0
        earliest = jnp.where(real, keys.positions, _LATEST).min(axis=-1)
        needed &= marks.q_positions.max(axis=-1)[:, None] >= earliest
    return needed.any(axis=-1)
