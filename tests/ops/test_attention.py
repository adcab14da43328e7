"""Attention against the textbook formula, and what packing promises."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax.config import ACTIVATION_RULES
from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention import attention
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes


def dense(q, k, v, mask, scale=None):
    """Float64 attention, one query head at a time; rows without any key give zeros."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, _, heads, width = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            scores = q[b, :, h] @ k[b, :, g].T * (width**-0.5 if scale is None else scale)
            weights = np.where(mask[b], np.exp(scores - scores.max()), 0.0)
            total = weights.sum(axis=1, keepdims=True)
            out[b, :, h] = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ v[b, :, g]
    return out


def inputs(batch=2, q_len=9, kv_len=None, heads=6, kv_heads=2, width=8, seed=0):
    kv_len = q_len if kv_len is None else kv_len
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (batch, q_len, heads, width)),
        jax.random.normal(keys[1], (batch, kv_len, kv_heads, width)),
        jax.random.normal(keys[2], (batch, kv_len, kv_heads, width)),
    )


def packed(length, seed=0):
    """Two rows of random segments; the second ends in padding."""
    rng = np.random.default_rng(seed)
    ids = 1 + np.sort(rng.integers(0, 4, (2, length)), axis=1)
    ids[1, -max(1, length // 5) :] = 0
    return ids


# 65 and 150 cross the blocks of queries.
@pytest.mark.parametrize("length, kv_heads", [(1, 2), (7, 1), (65, 6), (150, 2)])
def test_packed_causal_matches_dense(length, kv_heads):
    q, k, v = inputs(q_len=length, kv_heads=kv_heads)
    ids = packed(length)
    out = jax.jit(partial(attention, causal=True))(q, k, v, segment_ids_q=ids, segment_ids_kv=ids)
    mask = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None] & np.tri(length, dtype=bool)
    np.testing.assert_allclose(out, dense(q, k, v, mask), atol=2e-6)
    assert np.all(np.asarray(out)[ids == 0] == 0)


def test_unmasked_and_scaled():
    q, k, v = inputs(q_len=5, kv_len=11)
    out = attention(q, k, v, causal=False, scale=0.3)
    np.testing.assert_allclose(out, dense(q, k, v, np.ones((2, 5, 11), bool), scale=0.3), atol=2e-6)


def test_positions_decide_what_is_later():
    q, k, v = inputs(q_len=3, kv_len=10)
    slots = np.array([[2, 3, 4], [7, 8, 9]])
    out = attention(q, k, v, causal=True, q_positions=jnp.asarray(slots), kv_positions=jnp.arange(10)[None])
    np.testing.assert_allclose(out, dense(q, k, v, slots[:, :, None] >= np.arange(10)), atol=2e-6)


def test_huge_scores_stay_finite_with_exact_gradients():
    q, k, v = inputs(q_len=20)
    ids = jnp.asarray(packed(20))

    def total(q, k, v):
        out = attention(q * 1e3, k * 1e3, v, segment_ids_q=ids, segment_ids_kv=ids, causal=True)
        return jnp.square(out).sum()

    assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v))


def test_gradient_matches_finite_differences():
    q, k, v = inputs(batch=1, q_len=70, heads=2, kv_heads=1, width=4)
    ids = jnp.asarray(packed(70)[:1])
    direction = inputs(batch=1, q_len=70, heads=2, kv_heads=1, width=4, seed=9)

    def total(q, k, v):
        out = attention(q, k, v, segment_ids_q=ids, segment_ids_kv=ids, causal=True)
        return jnp.square(out).sum()

    def along(step):
        q_, k_, v_ = (
            np.asarray(x, np.float64) + step * np.asarray(d)
            for x, d in zip((q, k, v), direction, strict=True)
        )
        mask = (ids[:, :, None] == ids[:, None, :]) & np.tri(70, dtype=bool)
        return np.square(dense(q_, k_, v_, np.asarray(mask))).sum()

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert slope == pytest.approx((along(1e-5) - along(-1e-5)) / 2e-5, rel=1e-4)


def test_one_sample_cannot_move_another_by_a_bit():
    length = 150
    q, k, v = inputs(q_len=length)
    ids = packed(length)
    run = jax.jit(lambda q, k, v: attention(q, k, v, segment_ids_q=ids, segment_ids_kv=ids, causal=True))
    before = np.asarray(run(q, k, v))
    other = (ids == 2)[:, :, None, None]
    assert other.any()
    after = np.asarray(run(*(jnp.where(other, x * 100 + 7, x) for x in (q, k, v))))
    np.testing.assert_array_equal(before[ids != 2], after[ids != 2])
    assert np.abs(before[ids == 2] - after[ids == 2]).max() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(segment_ids_q=jnp.ones((2, 4), int)), "segment ids of both"),
        (dict(causal=True, q_positions=jnp.zeros((2, 4), int)), "positions of both"),
        (dict(causal=True), "needs positions"),
    ],
)
def test_half_given_arguments_are_refused(change, message):
    q, k, v = inputs(q_len=4, kv_len=6)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **{"causal": False, **change})


def test_heads_that_do_not_divide_are_refused():
    q, k, v = inputs(heads=5, kv_heads=2)
    with pytest.raises(ValueError, match="5 query heads"):
        attention(q, k, v, causal=True)


@pytest.mark.parametrize(
    "rules, heads, kv_heads, length",
    [
        (dict(), 8, 4, 150),  # heads over 4 devices
        (dict(), 8, 2, 65),  # fewer key heads than devices
        (dict(heads=None, kv_heads=None, queries="tensor"), 9, 3, 150),  # heads that do not divide
        (dict(heads=None, kv_heads=None, queries="tensor"), 3, 3, 7),
        (dict(heads=None, kv_heads=None), 3, 1, 30),  # the same on all
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_a_mesh_changes_neither_result_nor_gradient(rules, heads, kv_heads, length, causal):
    mesh = compat.make_mesh((2, 4), ("fsdp", "tensor"), jax.devices()[:8])
    rules = {**ACTIVATION_RULES, "batch": "fsdp", **rules}
    values = inputs(q_len=length, heads=heads, kv_heads=kv_heads)
    ids = jnp.asarray(packed(length))

    def total(q, k, v):
        out = attention(q, k, v, segment_ids_q=ids, segment_ids_kv=ids, causal=causal)
        return jnp.square(out).sum(), out

    both = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
    # A function of its own each: given the same one, jit would take the trace that it has.
    (_, want), want_gradients = jax.jit(lambda *values: both(*values))(*values)
    with logical_axes.activation_rules(mesh, rules):
        (_, got), gradients = jax.jit(lambda *values: both(*values))(*values)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for name, gradient, expected in zip("qkv", gradients, want_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=2e-5, err_msg=name)


def test_heads_that_the_mesh_cannot_split_are_refused():
    mesh = compat.make_mesh((2, 4), ("fsdp", "tensor"), jax.devices()[:8])
    q, k, v = inputs(heads=6, kv_heads=3)
    with (
        logical_axes.activation_rules(mesh, {**ACTIVATION_RULES, "batch": "fsdp"}),
        pytest.raises(UserError, match="6 query and 3 key heads do not split into 4"),
    ):
        attention(q, k, v, causal=True)
