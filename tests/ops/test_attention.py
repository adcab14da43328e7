"""Attention against its dense formula, and the isolation of packed samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention_reference import dense, dense_mask, inputs, packed, self_attention
from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention import MaskInfo, attention
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES


# 65 and 150 cross the blocks of queries.
@pytest.mark.parametrize("length, kv_heads", [(1, 2), (7, 1), (65, 6), (150, 2)])
def test_packed_causal_matches_dense(length, kv_heads):
    q, k, v = inputs(q_len=length, kv_heads=kv_heads)
    ids = packed(length)
    out = jax.jit(self_attention(ids, causal=True))(q, k, v)
    np.testing.assert_allclose(out, dense(q, k, v, dense_mask(ids, causal=True)), atol=2e-6)
    assert np.all(np.asarray(out)[ids == 0] == 0)


def test_unmasked_and_scaled():
    q, k, v = inputs(q_len=5, kv_len=11)
    out = attention(q, k, v, MaskInfo(), scale=0.3)
    np.testing.assert_allclose(out, dense(q, k, v, np.ones((2, 5, 11), bool), scale=0.3), atol=2e-6)


def test_positions_decide_what_is_later():
    q, k, v = inputs(q_len=3, kv_len=10)
    slots = np.array([[2, 3, 4], [7, 8, 9]])
    mask = MaskInfo(q_positions=jnp.asarray(slots), kv_positions=jnp.arange(10)[None], causal=True)
    out = attention(q, k, v, mask)
    np.testing.assert_allclose(out, dense(q, k, v, slots[:, :, None] >= np.arange(10)), atol=2e-6)


def test_huge_scores_stay_finite_with_exact_gradients():
    q, k, v = inputs(q_len=20)
    attend = self_attention(packed(20), causal=True)

    def total(q, k, v):
        return jnp.square(attend(q * 1e3, k * 1e3, v)).sum()

    assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v))


def test_gradient_matches_finite_differences():
    q, k, v = inputs(batch=1, q_len=70, heads=2, kv_heads=1, width=4)
    ids = packed(70)[:1]
    attend = self_attention(ids, causal=True)
    direction = inputs(batch=1, q_len=70, heads=2, kv_heads=1, width=4, seed=9)

    def total(q, k, v):
        return jnp.square(attend(q, k, v)).sum()

    def along(step):
        q_, k_, v_ = (
            np.asarray(x, np.float64) + step * np.asarray(d)
            for x, d in zip((q, k, v), direction, strict=True)
        )
        return np.square(dense(q_, k_, v_, dense_mask(ids, causal=True))).sum()

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert slope == pytest.approx((along(1e-5) - along(-1e-5)) / 2e-5, rel=1e-4)


def test_one_sample_cannot_move_another_by_a_bit():
    length = 150
    q, k, v = inputs(q_len=length)
    ids = packed(length)
    run = jax.jit(self_attention(ids, causal=True))
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
        (dict(window=3), "window=3 must be positive and needs causal=True"),
        (
            dict(
                causal=True, window=0, q_positions=jnp.zeros((2, 4), int), kv_positions=jnp.zeros((2, 6), int)
            ),
            "window=0 must be positive",
        ),
    ],
)
def test_half_given_arguments_are_refused(change, message):
    q, k, v = inputs(q_len=4, kv_len=6)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, MaskInfo(**change))


def test_heads_that_do_not_divide_are_refused():
    q, k, v = inputs(heads=5, kv_heads=2)
    with pytest.raises(ValueError, match="5 query heads"):
        attention(q, k, v, MaskInfo(causal=True))


@pytest.mark.parametrize(
    "rules, heads, kv_heads, length",
    [
        (dict(), 8, 4, 150),  # heads over 4 devices
        (dict(), 8, 2, 65),  # fewer key heads than devices
        (dict(heads=None, kv_heads=None, queries="tensor"), 9, 3, 150),  # heads not divisible by 4
        (dict(heads=None, kv_heads=None, queries="tensor"), 3, 3, 7),
        (dict(heads=None, kv_heads=None), 3, 1, 30),  # replicated
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_a_mesh_changes_neither_result_nor_gradient(rules, heads, kv_heads, length, causal):
    mesh = compat.make_mesh((2, 4), ("fsdp", "tensor"), jax.devices()[:8])
    rules = {**ACTIVATION_RULES, "batch": "fsdp", "length": None, **rules}
    values = inputs(q_len=length, heads=heads, kv_heads=kv_heads)
    attend = self_attention(packed(length), causal=causal)

    def total(q, k, v):
        out = attend(q, k, v)
        return jnp.square(out).sum(), out

    both = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
    # Separate functions, because jit would reuse the trace of the same one.
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
        logical_axes.activation_rules(mesh, {**ACTIVATION_RULES, "batch": "fsdp", "length": None}),
        pytest.raises(UserError, match="6 query and 3 key heads do not split into 4"),
    ):
        attention(q, k, v, MaskInfo(causal=True))
