"""Scans over stacked layers of several kinds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.helpers import equations
from vilam3_jax.models.layers import scan_layers

WIDTH = 5


def body(carry, layer, kind):
    """Order matters, as do kind, kernel and index of each layer."""
    x, seen = carry
    kernel, index = layer
    x = jnp.tanh(x @ kernel) if kind == "a" else x + jnp.sin(x @ kernel) * (1 if kind is None else 2)
    return x, seen.at[index].set(x.sum())


def unrolled(carry, layers, kinds):
    for i, kind in enumerate(kinds):
        carry = body(carry, jax.tree.map(lambda x, i=i: x[i], layers), kind)
    return carry


def problem(kinds):
    count = len(kinds)
    kernels = jax.random.normal(jax.random.key(0), (count, WIDTH, WIDTH)) * 0.5
    x = jax.random.normal(jax.random.key(1), (2, WIDTH))
    return (x, jnp.zeros(count)), (kernels, jnp.arange(count))


# (kinds, period, whole periods); what is left over is unrolled.
PATTERNS = {
    "one layer": ("a", 1, 1),
    "all alike": ("aaaaa", 1, 5),
    "whole periods": ("aabaab", 3, 2),
    "with a remainder": ("aabaabaa", 3, 2),
    "as Gemma 3": ("aaaaabaaaaabaa", 6, 2),
    "remainder of one": ("ababa", 2, 2),
    "late exception": ("aaaab", 5, 1),
    "early exception": ("baaaa", 5, 1),
    "three kinds": ("abcabcabca", 3, 3),
    "irregular": ("abbabaab", 8, 1),
    "almost periodic": ("abcabcabb", 9, 1),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_scan_equals_the_unrolled_loop(name):
    kinds, period, count = PATTERNS[name]
    kinds = [{"c": None}.get(kind, kind) for kind in kinds]
    carry, (kernels, index) = problem(kinds)

    def value(layers_of, kernels, x):
        x, seen = layers_of((x, carry[1]), (kernels, index))
        return jnp.square(x).sum() + (seen * jnp.arange(len(kinds))).sum(), (x, seen)

    def scanned(carry, layers):
        return scan_layers(body, carry, layers, kinds)

    def looped(carry, layers):
        return unrolled(carry, layers, kinds)

    results = []
    for layers_of in (scanned, looped):
        both = jax.value_and_grad(lambda *args, f=layers_of: value(f, *args), (0, 1), has_aux=True)
        results.append(jax.jit(both)(kernels, carry[0]))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(results[0][0][1][1]) != 0), "every layer ran"

    scans = [
        equation.params["length"]
        for equation, _ in equations(jax.make_jaxpr(scanned)(carry, (kernels, index)).jaxpr)
        if equation.primitive.name == "scan"
    ]
    assert scans == [count] and period * count <= len(kinds) < period * (count + 1)
