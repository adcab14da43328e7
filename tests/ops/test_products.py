"""Matrix products in JAX's default precision: against float64 sums of rounded factors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention_reference import self_attention
from vilam3_jax.ops.losses import chunked_cross_entropy
from vilam3_jax.sharding.matmul import einsum

SPECS = [
    ("ai,io->ao", (5, 7), (7, 3)),
    ("abi,io->abo", (2, 5, 7), (7, 3)),
    ("bksd,bknd->bksn", (2, 3, 4, 6), (2, 3, 5, 6)),
]


def normal(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


def lowered(function, *arguments):
    return jax.jit(function).lower(*arguments).as_text()


@pytest.mark.parametrize("spec, first, second", SPECS)
def test_factors_are_rounded_and_sums_are_not(spec, first, second):
    x, y = normal(first, 0), normal(second, 1)
    with jax.default_matmul_precision("bfloat16"):
        out, back = jax.vjp(lambda x, y: einsum(spec, x, y), x, y)
        gradient = normal(out.shape, 2)
        d_x, d_y = back(gradient)
    assert out.dtype == d_x.dtype == d_y.dtype == jnp.float32
    factors, result = spec.split("->")
    left, right = factors.split(",")
    np.testing.assert_allclose(out, np.einsum(spec, rounded(x), rounded(y)), rtol=1e-5, atol=1e-5)
    want = np.einsum(f"{result},{right}->{left}", rounded(gradient), rounded(y))
    np.testing.assert_allclose(d_x, want, rtol=1e-5, atol=1e-5)
    want = np.einsum(f"{left},{result}->{right}", rounded(x), rounded(gradient))
    np.testing.assert_allclose(d_y, want, rtol=1e-5, atol=1e-5)
    assert np.abs(out - np.einsum(spec, np.asarray(x, np.float64), np.asarray(y, np.float64))).max() > 1e-4


@pytest.mark.parametrize("precision", [None, "highest"])
def test_other_settings_leave_factors_alone(precision):
    x, y = normal((5, 7), 0), normal((7, 3), 1)
    with jax.default_matmul_precision(precision):
        out = einsum("ai,io->ao", x, y)
        assert "bf16" not in lowered(lambda x, y: einsum("ai,io->ao", x, y), x, y)
    np.testing.assert_allclose(out, np.asarray(x, np.float64) @ np.asarray(y, np.float64), atol=1e-5)


def test_a_frozen_factor_costs_no_product():
    x, y = normal((5, 7), 0), normal((7, 3), 1)
    with jax.default_matmul_precision("bfloat16"):
        text = lowered(jax.grad(lambda x: einsum("ai,io->ao", x, y).sum()), x)
    assert text.count("dot_general") == 1, text  # the value is unused


def test_the_loss_rounds_its_products_too():
    hidden, kernel = normal((2, 9, 8), 0), normal((8, 30), 1)
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 30)
    segments, weights = jnp.ones((2, 9), int), jnp.ones((2, 9))

    def loss(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, tokens, weights, segments, chunk=4)[0]

    exact = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    on_grid = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), (hidden, kernel))
    want = jax.value_and_grad(loss, (0, 1))(*on_grid)
    with jax.default_matmul_precision("bfloat16"):
        got = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    assert got[0] == pytest.approx(float(want[0]), rel=1e-6) and got[0] != exact[0]
    for part, expected in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(part, expected, atol=0.02 * np.abs(expected).max())


def test_attention_rounds_its_products_too():
    q, k, v = normal((2, 150, 6, 8), 0), normal((2, 150, 2, 8), 1), normal((2, 150, 2, 8), 2)
    direction = normal((2, 150, 6, 8), 3)
    attend = self_attention(np.repeat([[1] * 90 + [2] * 40 + [0] * 20], 2, axis=0), causal=True)

    def total(q, k, v):
        return (attend(q, k, v) * direction).sum()

    # Separate functions, because the setting is read while tracing.
    want = jax.jit(jax.grad(lambda *x: total(*x), (0, 1, 2)))(q, k, v)
    with jax.default_matmul_precision("bfloat16"):
        gradient = jax.jit(jax.grad(lambda *x: total(*x), (0, 1, 2)))
        got = gradient(q, k, v)
        products = [line for line in gradient.lower(q, k, v).as_text().splitlines() if "dot_general" in line]
    assert products and all("xbf16>, tensor<" in line and "-> tensor<" in line for line in products)
    for ours, exact in zip(got, want, strict=True):
        error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 1e-2, error
