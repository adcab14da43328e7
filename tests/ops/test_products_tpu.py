"""Products with sharded weights compiled for a TPU slice, without a TPU: collectives of their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.plan import hlo, topology
from vilam3_jax.sharding import logical_axes, matmul
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES
from vilam3_jax.sharding.weights import Weight

pytest.importorskip("libtpu")
LAYERS, WIDTH, HEAD_DIM = 4, 2048, 128
STORED = ((None, ("fsdp", "fsdp_line"), None), (None, None, ("fsdp", "fsdp_line")))  # to and from heads


@pytest.mark.slow
def test_gradients_of_products_with_heads_are_scattered_in_slices_thinner_than_the_lanes():
    mesh = mesh_lib.build_mesh(mesh_lib.MeshConfig(fsdp=512), topology.parse("v5p:8x8x8").devices())
    assert WIDTH // mesh.shape["fsdp"] < matmul.LANES

    def argument(shape, kind, *names):
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, PartitionSpec(*names)))

    def layer(x, kernels):
        features = (WIDTH // HEAD_DIM, HEAD_DIM)
        into, out = (Weight(kernel, (stored,)) for kernel, stored in zip(kernels, STORED, strict=True))
        heads = matmul.linear(x, into, (WIDTH,), features)
        heads = jnp.tanh(heads.swapaxes(1, 2)).swapaxes(1, 2)
        return x + matmul.linear(heads, out, features, (WIDTH,)), None

    def loss(kernels, x):
        return jax.lax.scan(jax.checkpoint(layer), x, kernels)[0].astype(jnp.float32).var()

    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        kernels = tuple(argument((LAYERS, WIDTH, WIDTH), jnp.float32, *names) for names in STORED)
        x = argument((1024, 4096, WIDTH), jnp.bfloat16, ("fsdp", "fsdp_line"))
        compiled = jax.jit(jax.grad(loss)).lower(kernels, x).compile()
    sent = hlo.read(compiled.as_text()).wire_bytes()
    assert sent.get("reduce-scatter", 0) > 0.8 * 2 * LAYERS * 2 * WIDTH**2
    assert sent.get("all-reduce", 0) < 0.1 * sent["reduce-scatter"]
