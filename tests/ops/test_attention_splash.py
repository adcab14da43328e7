"""The TPU kernel, interpreted on the CPU, against the dense formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention_reference import dense, dense_mask, inputs, packed, self_attention
from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention import MaskInfo, attention, backends, splash
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(splash, "INTERPRET", True)


def one_device():
    return compat.make_mesh((1, 1), ("fsdp", "tensor"), jax.devices()[:1])


def by(choice, mesh, function, *args, **rules):
    """`function(*args)`, jitted anew, with attention by `choice`."""
    rules = {**ACTIVATION_RULES, "batch": "fsdp", "length": None, **rules}
    with logical_axes.activation_rules(mesh, rules), backends.use(choice):
        return jax.jit(lambda *values: function(*values))(*args)


def with_gradients(ids, **mask):
    def total(*values):
        out = self_attention(ids, **mask)(*values)
        return jnp.square(out).sum(), out

    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length, kv_heads, width", [(7, 1, 8), (150, 2, 72), (128, 6, 16)])
def test_packed_matches_dense_and_the_gradient_of_xla(interpreted, length, kv_heads, width, causal):
    q, k, v = inputs(q_len=length, kv_heads=kv_heads, width=width)
    ids = packed(length)
    function = with_gradients(ids, causal=causal)
    (_, out), gradients = by("splash", one_device(), function, q, k, v)
    np.testing.assert_allclose(out, dense(q, k, v, dense_mask(ids, causal)), atol=2e-6)
    assert np.all(np.asarray(out)[ids == 0] == 0)
    _, expected = by("xla", one_device(), function, q, k, v)
    for name, gradient, other in zip("qkv", gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, other, atol=2e-5, err_msg=name)


def test_patches_of_an_image_and_a_pooling_query(interpreted):
    q, k, v = inputs(batch=1, q_len=729, heads=2, kv_heads=2, width=24)
    out = by("splash", one_device(), lambda *x: attention(*x, MaskInfo()), q, k, v)
    np.testing.assert_allclose(out, dense(q, k, v, np.ones((1, 729, 729), bool)), atol=2e-6)
    pooled = by("splash", one_device(), lambda *x: attention(*x, MaskInfo()), q[:, :1], k, v)
    np.testing.assert_allclose(pooled, out[:, :1], atol=2e-6)


def test_queries_without_a_key_give_zeros(interpreted):
    q, k, v = inputs(q_len=5, kv_len=9)
    ids_q, ids_kv = np.array([[1, 1, 2, 3, 0]] * 2), np.array([[1, 1, 1, 3, 3, 0, 0, 0, 0]] * 2)

    def run(q, k, v):
        return attention(q, k, v, MaskInfo(jnp.asarray(ids_q), jnp.asarray(ids_kv)))

    mask = (ids_q[:, :, None] == ids_kv[:, None, :]) & (ids_q != 0)[:, :, None]
    out = by("splash", one_device(), run, q, k, v)
    np.testing.assert_allclose(out, dense(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize(
    "rules, heads, kv_heads",
    [
        (dict(), 8, 4),
        (dict(), 8, 2),
        (dict(heads=None, kv_heads=None, queries="tensor"), 3, 1),
    ],
)
def test_a_mesh_changes_neither_result_nor_gradient(interpreted, rules, heads, kv_heads):
    mesh = compat.make_mesh((2, 4), ("fsdp", "tensor"), jax.devices()[:8])
    values = inputs(q_len=600, heads=heads, kv_heads=kv_heads)
    function = with_gradients(packed(600), causal=True)
    (_, want), want_gradients = by("xla", one_device(), function, *values)
    (_, got), gradients = by("splash", mesh, function, *values, **rules)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for name, gradient, expected in zip("qkv", gradients, want_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("length", [150, 600])
def test_devices_share_the_queries_of_a_tower(interpreted, length):
    mesh = compat.make_mesh((2, 4), ("fsdp", "tensor"), jax.devices()[:8])
    values = inputs(q_len=length, heads=3, kv_heads=3)
    function = with_gradients(None, causal=False)
    rules = dict(heads=None, kv_heads=None, queries="tensor")
    (_, want), want_gradients = by("xla", one_device(), function, *values)
    (_, got), gradients = by("splash", mesh, function, *values, **rules)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for name, gradient, expected in zip("qkv", gradients, want_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=2e-5, err_msg=name)


def test_without_a_tpu_the_kernel_is_refused():
    q, k, v = inputs()
    with pytest.raises(UserError, match="kernel for TPUs, and the devices are cpu"):
        by("splash", one_device(), self_attention(causal=True), q, k, v)
