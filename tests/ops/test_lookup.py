"""Lookup in a sharded table: the numbers of a plain lookup, and no device holds the whole table."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.embedding_lookup import lookup
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.sharding.weights import Weight

VOCAB, WIDTH, ROWS, LENGTH = 24, 16, 8, 6
SPLIT = ("fsdp", logical_axes.FSDP_LINE)


def plain(ids, table):
    return jnp.take(table, ids, axis=0).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    "axes,stored,whole",
    [
        (dict(data=2, fsdp=4), (None, "fsdp"), False),
        (dict(data=2, fsdp=2, tensor=2), ("tensor", "fsdp"), False),
        (dict(fsdp=2, context=2, tensor=2), ("tensor", "fsdp"), False),
        (dict(data=2, fsdp=2, fsdp_line=2), (None, SPLIT), False),
        (dict(fsdp=2, tensor=4), ("tensor", None), False),
        (dict(fsdp=4, tensor=2), (None, ("fsdp", "tensor")), True),  # left to XLA
        (dict(data=8), (None, None), True),
    ],
)
def test_equals_a_plain_lookup(axes, stored, whole):
    names = [*MESH_AXES[:2], logical_axes.FSDP_LINE, *MESH_AXES[2:]]
    mesh = compat.make_mesh([axes.get(name, 1) for name in names], names, jax.devices()[:8])
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)))
    weights = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.bfloat16)

    def run(ids, table):
        x, back = jax.vjp(lambda t: lookup(ids, Weight(t, (stored,)), jnp.bfloat16), table)
        return x, back(weights)[0]

    placed = (
        NamedSharding(mesh, PartitionSpec(("data", *SPLIT))),
        NamedSharding(mesh, PartitionSpec(*stored)),
    )
    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        compiled = jax.jit(run, in_shardings=placed, out_shardings=placed).lower(ids, table).compile()
    found, gradient = compiled(jax.device_put(ids, placed[0]), jax.device_put(table, placed[1]))
    wanted, back = jax.vjp(lambda t: plain(ids, t), table)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(gradient, back(weights)[0], rtol=1e-6, atol=1e-6)
    assert whole or not re.search(rf"f32\[{VOCAB},{WIDTH}\]", compiled.as_text())


def test_rows_that_do_not_divide_are_left_to_the_partitioner():
    mesh = compat.make_mesh([1, 8, 1, 1], MESH_AXES, jax.devices()[:8])
    ids, table = jnp.zeros((3, 2), int), jnp.ones((VOCAB, WIDTH))
    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        weight = Weight(table, ((None, "fsdp"),))
        found = jax.jit(lambda ids, weight: lookup(ids, weight, jnp.float32))(ids, weight)
    np.testing.assert_array_equal(found, np.ones((3, 2, WIDTH)))
