"""The TPU kernel compiled for a TPU topology, without a TPU, at the sizes of Llama-3-8B and SigLIP-So400m."""

from __future__ import annotations

import os
from math import prod

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from tests.ops.attention_reference import self_attention
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES
from vilam3_jax.sharding.mesh import MESH_AXES

pytest.importorskip("libtpu")


@pytest.fixture(scope="module")
def chips():
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices


@pytest.mark.slow
@pytest.mark.parametrize(
    "length, heads, kv_heads, width, causal, window, axes, kernels, exchanges",
    [
        (4096, 32, 8, 128, True, None, dict(fsdp=2, tensor=2), 3, False),  # forward, and two backward
        (4096, 32, 8, 128, True, 1000, dict(fsdp=2, tensor=2), 3, False),
        (729, 16, 16, 72, False, None, dict(fsdp=4), 2, False),  # forward, fused backward
        (8192, 32, 8, 128, True, None, dict(fsdp=2, context=2), 3, True),
    ],
)
def test_forward_and_backward_compile(
    chips, length, heads, kv_heads, width, causal, window, axes, kernels, exchanges
):
    mesh = compat.make_mesh([axes.get(axis, 1) for axis in MESH_AXES], MESH_AXES, chips)
    rows = 2 * axes["fsdp"]
    split = "context" if exchanges else None

    def argument(kind, *sizes_and_axes):
        sizes, names = zip(*sizes_and_axes, strict=True)
        return jax.ShapeDtypeStruct(sizes, kind, sharding=NamedSharding(mesh, PartitionSpec(*names)))

    row, column = (rows, ("data", "fsdp")), (length, split)
    q = argument(jnp.bfloat16, row, column, (heads, "tensor"), (width, None))
    k = argument(jnp.bfloat16, row, column, (kv_heads, "tensor"), (width, None))
    ids = argument(jnp.int32, row, column)

    def total(q, k, v, ids):
        attend = self_attention(ids if causal else None, causal=causal, window=window)
        return attend(q, k, v).astype(jnp.float32).sum()

    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, ids).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    assert ("all-to-all" in text) == exchanges
    share = prod(q.shape) * 2 / prod(axes.values())  # bytes of a device's queries
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * share
