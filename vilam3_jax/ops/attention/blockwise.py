"""Attention of long rows by XLA, one pair of query and key blocks at a time.

Runs on one device, or on a ring of devices that each have a part of the row. The softmax is updated block by
block (arXiv:2112.05682), scores are recomputed for the gradient, and in a ring the keys travel
(arXiv:2310.01889), so no array has the size [L, L]. Pairs of blocks that the mask excludes are skipped.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.runtime import compat
from vilam3_jax.sharding.matmul import einsum

BLOCK = 512
# Finite, and less than any score.
_MASKED = -1e30
_LATEST = jnp.iinfo(jnp.int32).max


class Ring(NamedTuple):
    """Mesh axis over which a row is split, and its size."""

    axis: str
    size: int


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, *, ring: Ring | None = None
) -> jax.Array:
    """One device's part: scaled queries [B, n, b, H, hd] in n blocks, k, v [B, Lk, K, hd] -> like queries.

    Args:
      mask: segment ids and positions of queries [B or 1, n, b] and keys [B or 1, Lk].
      ring: inside `shard_map`, the axis over which keys are split; None if all are local.
    """
    batch, count, length, _, head_dim = q.shape
    kv_heads, block = k.shape[2], min(BLOCK, k.shape[1])

    def keys(x: jax.Array) -> jax.Array:
        """[B, Lk, ...] -> [m, B, block, ...]; padding has segment id 0."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    # [n, B, K, G, b, hd] and [m, B, K, s, hd].
    rows = q.reshape(batch, count, length, kv_heads, -1, head_dim).transpose(1, 0, 3, 4, 2, 5)
    k, v = (keys(x).swapaxes(2, 3) for x in (k, v))
    by_block = dataclasses.replace(
        mask,
        segment_ids_q=jnp.swapaxes(mask.segment_ids_q, 0, 1),
        segment_ids_kv=keys(mask.segment_ids_kv),
        q_positions=jnp.swapaxes(mask.q_positions, 0, 1),
        kv_positions=keys(mask.kv_positions),
    )
    out: Any = _attend(*compat.equally_varying(rows, k, v), by_block, ring)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape)


def balance(x: jax.Array, ring: Ring) -> jax.Array:
    """Redistributes the parts of a row so that all devices have equal work under a causal mask.

    The row is cut into twice as many parts as devices; each device gets one and its mirror image.

    Args:
      x: [B, L / size, ...], contiguous parts along the ring, of even length.
      ring: axis of the surrounding `shard_map`.
    """
    return _exchange(x, ring, step=1)


def restore(x: jax.Array, ring: Ring) -> jax.Array:
    """The inverse of `balance`."""
    return _exchange(x, ring, step=-1)


def _exchange(x: jax.Array, ring: Ring, step: int) -> jax.Array:
    moved = []
    for half, piece in enumerate(jnp.split(x, 2, axis=1)):
        pairs = [(i, min(2 * i + half, 2 * ring.size - 1 - 2 * i - half)) for i in range(ring.size)]
        moved.append(jax.lax.ppermute(piece, ring.axis, [pair[::step] for pair in pairs]))
    return jnp.concatenate(moved, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, ring: Ring | None) -> jax.Array:
    """Queries [n, B, K, G, b, hd], k and v [m, B, K, s, hd] -> like the queries."""
    return _attend_forward(q, k, v, mask, ring)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, ring: Ring | None
) -> tuple[Any, Any]:
    like = q[..., :1].astype(jnp.float32)
    state = _State(jnp.full_like(like, _MASKED), jnp.zeros_like(like), jnp.zeros_like(q, jnp.float32))
    # The state varies over the same mesh axes as what is added to it.
    _, *state = compat.equally_varying(q, *state)

    def visit(state: _State, keys: _Keys) -> _State:
        return _visit_forward(q, mask, keys, state)

    keys = _Keys(k, v, mask.segment_ids_kv, mask.kv_positions)
    if ring is not None:

        def step(carry: tuple[_State, _Keys], _: None) -> tuple[tuple[_State, _Keys], None]:
            state, keys = carry
            return (visit(state, keys), _pass_on(keys, ring)), None

        keys = _Keys(*compat.equally_varying(*keys))
        (state, keys), _ = jax.lax.scan(step, (_State(*state), keys), None, ring.size - 1)
    peak, total, sums = visit(_State(*state), keys)
    seen = total > 0
    out = jnp.where(seen, sums / jnp.where(seen, total, 1.0), 0.0).astype(q.dtype)
    # Without any key, exp(score - log_total) is 0 for all.
    log_total = jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1.0)), -_MASKED)
    return out, (q, k, v, mask, out, log_total)


def _attend_backward(ring: Ring | None, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, mask, out, log_total = kept
    # The derivative of the softmax subtracts sum(weights * d_weights), which is this.
    mean = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    gradients = (jnp.zeros_like(x, jnp.float32) for x in (q, k, v))
    _, d_q, d_k, d_v = compat.equally_varying(q, *gradients)

    def visit(keys: _Keys, d_q: jax.Array, d_k: jax.Array, d_v: jax.Array) -> tuple[jax.Array, ...]:
        return _visit_backward(q, mask, keys, (d_out, log_total, mean), (d_q, d_k, d_v))

    keys = _Keys(k, v, mask.segment_ids_kv, mask.kv_positions)
    if ring is not None:
        # The gradients of keys travel with them and return to their device after a full round.
        def step(carry: Any, _: None) -> tuple[Any, None]:
            keys, d_q, d_k, d_v = carry
            d_q, d_k, d_v = visit(keys, d_q, d_k, d_v)
            return (_pass_on(keys, ring), d_q, *_pass_on((d_k, d_v), ring)), None

        keys = _Keys(*compat.equally_varying(*keys))
        (keys, d_q, d_k, d_v), _ = jax.lax.scan(step, (keys, d_q, d_k, d_v), None, ring.size - 1)
    d_q, d_k, d_v = visit(keys, d_q, d_k, d_v)
    if ring is not None:
        d_k, d_v = _pass_on((d_k, d_v), ring)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


class _Keys(NamedTuple):
    """Blocks of keys, of this or another device."""

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


class _State(NamedTuple):
    """Running softmax, float32: highest score and sum of weights [..., 1], weighted sum [..., hd]."""

    peak: jax.Array
    total: jax.Array
    sums: jax.Array


def _pass_on(values: Any, ring: Ring) -> Any:
    to_next = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, to_next), values)


def _visit_forward(q: jax.Array, mask: MaskInfo, keys: _Keys, state: _State) -> _State:
    """Updates the state of all blocks of queries with all blocks of `keys`."""

    def queries(block: Any) -> _State:
        q, ids, positions, state, needed = block

        def see(state: _State, keys: _Keys) -> _State:
            allowed = _allowed(ids, positions, keys, mask)
            scores = jnp.where(allowed, einsum("bkgnd,bksd->bkgns", q, keys.k, jnp.float32), _MASKED)
            peak = jnp.maximum(state.peak, scores.max(axis=-1, keepdims=True))
            # The weights of a query without a key so far must be 0; exp(_MASKED - _MASKED) is 1.
            base = jnp.where(peak > _MASKED, peak, 0.0)
            weights, fade = jnp.exp(scores - base), jnp.exp(state.peak - base)
            sums = einsum("bkgns,bksd->bkgnd", weights.astype(q.dtype), keys.v, jnp.float32)
            total = state.total * fade + weights.sum(axis=-1, keepdims=True)
            return _State(peak, total, state.sums * fade + sums)

        def step(state: _State, key_block: tuple[_Keys, jax.Array]) -> tuple[_State, None]:
            keys, needed = key_block
            return jax.lax.cond(needed, see, lambda state, _: state, state, keys), None

        return jax.lax.scan(step, state, (keys, needed))[0]

    needed = _needed(mask, keys)
    return jax.lax.map(queries, (q, mask.segment_ids_q, mask.q_positions, state, needed))


def _visit_backward(
    q: jax.Array,
    mask: MaskInfo,
    keys: _Keys,
    of_queries: tuple[jax.Array, jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the contributions of all pairs of blocks to the float32 gradients of queries, keys and values.

    `of_queries` are the gradient of the output, the log of the sum of weights, and the weighted mean of the
    gradients of the weights.
    """

    def queries(carry: Any, block: Any) -> tuple[Any, jax.Array]:
        q, ids, positions, (d_out, log_total, mean), d_q, needed = block

        def see(keys: _Keys) -> tuple[jax.Array, jax.Array, jax.Array]:
            allowed = _allowed(ids, positions, keys, mask)
            scores = jnp.where(allowed, einsum("bkgnd,bksd->bkgns", q, keys.k, jnp.float32), _MASKED)
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
    needed = _needed(mask, keys)
    blocks = (q, mask.segment_ids_q, mask.q_positions, of_queries, d_q, needed)
    (d_k, d_v), d_q = jax.lax.scan(queries, (d_k, d_v), blocks)
    return d_q, d_k, d_v


def _over_groups(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Weights [B, K, G, b, s] and x [B, K, G, b, hd] -> [B, K, s, hd], summed over a head's queries."""
    weights, x = (y.reshape(*x.shape[:2], -1, y.shape[-1]) for y in (weights, x))
    return einsum("bkns,bknd->bksd", weights, x, jnp.float32)


def _allowed(ids: jax.Array, positions: jax.Array, keys: _Keys, mask: MaskInfo) -> jax.Array:
    """Bool [B or 1, 1, 1, b, s]: which keys a query may attend to."""
    allowed = (ids[:, :, None] == keys.segment_ids[:, None]) & (ids != 0)[:, :, None]
    if mask.causal:
        allowed &= mask.allowed(positions, keys.positions)
    return allowed[:, None, None]


def _needed(mask: MaskInfo, keys: _Keys) -> jax.Array:
    """Bool [n, m]: whether any query of a block may attend to any key of the other, in any row.

    Segments are compared by their lowest and highest id: packers number them in order.
    """

    def span(values: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(real, values, _LATEST).min(axis=-1), jnp.where(real, values, -1).max(axis=-1)

    ids_q, ids_kv = mask.segment_ids_q, keys.segment_ids
    assert ids_q is not None and mask.q_positions is not None
    (low_q, high_q), (low_kv, high_kv) = span(ids_q, ids_q != 0), span(ids_kv, ids_kv != 0)
    needed = (low_q[:, None] <= high_kv) & (low_kv <= high_q[:, None])
    if mask.causal:
        first_q, last_q = span(mask.q_positions, ids_q != 0)
        first_kv, last_kv = span(keys.positions, ids_kv != 0)
        needed &= last_q[:, None] >= first_kv
        if mask.window is not None:
            needed &= first_q[:, None] - last_kv < mask.window
    return needed.any(axis=-1)
