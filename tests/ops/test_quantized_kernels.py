"""Kernels stored quantised: against Qwix, and sharded against unsharded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.ops import quantized
from vilam3_jax.ops.quantized import (
    NF4_TILE,
    QuantizedKernel,
    quantize_kernel,
    quantize_table,
    scaled_einsum,
)
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.embedding_lookup import lookup
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES
from vilam3_jax.sharding.matmul import linear
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.sharding.weights import Weight

qwix = pytest.importorskip("qwix")
KINDS = ("int8", "nf4")
BATCH, LENGTH, IN, OUT = 8, 6, 4 * NF4_TILE, 48


def kernel_of(shape, seed=0, dtype=jnp.float32):
    wide = jnp.exp(jax.random.normal(jax.random.key(seed + 1), (*shape[:-2], shape[-2] // 32, 1, shape[-1])))
    noise = jax.random.normal(jax.random.key(seed), (*shape[:-2], shape[-2] // 32, 32, shape[-1]))
    return (noise * wide).reshape(shape).astype(dtype)


def by_qwix(kernel, kind):
    tiles = {1: NF4_TILE} if kind == "nf4" else {}
    found = qwix.quantize(kernel, "nf4" if tiles else jnp.int8, channelwise_axes=(0, 2), tiled_axes=tiles)
    return qwix.dequantize(found)


@pytest.mark.parametrize("kind, size, error", [("int8", 1.02, 0.03), ("nf4", 0.57, 0.2)])
def test_numbers_are_those_of_qwix_in_less_memory(kind, size, error):
    kernel = kernel_of((3, IN, OUT))
    found = quantize_kernel(kernel, kind)
    assert found.shape == kernel.shape and found.dtype == kernel.dtype
    np.testing.assert_array_equal(found.dequantize(), by_qwix(kernel, kind))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(found)) <= size * kernel.size
    gap = np.linalg.norm(found.dequantize() - kernel) / np.linalg.norm(kernel)
    assert 1e-3 < gap < error
    np.testing.assert_array_equal(found[1:].dequantize(), found.dequantize()[1:])
    assert found.astype(jnp.bfloat16).dequantize().dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", ["none", "out", "in"])
def test_a_product_is_that_of_the_dequantised_kernel(kind, heads):
    kernel = quantize_kernel(kernel_of((IN, OUT)), kind)
    x = jax.random.normal(jax.random.key(5), (BATCH, LENGTH, *((4, IN // 4) if heads == "in" else (IN,))))
    out_features = (OUT // 16, 16) if heads == "out" else (OUT,)

    def ours(x):
        return linear(x, kernel, x.shape[2:], out_features)

    def plain(x):
        return linear(x, kernel.dequantize(), x.shape[2:], out_features)

    (out, back), (want, want_back) = jax.vjp(ours, x), jax.vjp(plain, x)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(back(jnp.cos(want))[0], want_back(jnp.cos(want))[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [("fsdp", "tensor"), ("tensor", "fsdp"), (("fsdp", "data"), None)])
def test_sharded_is_unsharded(kind, stored):
    """Also for scales with too few rows to split, which stay whole where the kernel is split."""
    mesh = compat.make_mesh([2, 2, 1, 2], MESH_AXES, jax.devices()[:8])
    kernel = quantize_kernel(kernel_of((IN, OUT)), kind)
    if kind == "nf4" and stored[1] is None:
        kernel = QuantizedKernel(kernel.qvalue[:NF4_TILE], kernel.scale[:2], kind, kernel.dtype)
    x = jax.random.normal(jax.random.key(5), (BATCH, LENGTH, kernel.shape[0]))
    scale_rows = stored[0] if kind == "nf4" and stored[1] else None
    specs = PartitionSpec(*stored), PartitionSpec(scale_rows, stored[1])
    placed = [NamedSharding(mesh, spec) for spec in specs]
    kernel = jax.device_put(kernel, QuantizedKernel(*placed, kind, kernel.dtype))

    def run(x, kernel):
        weight = Weight(kernel, tuple(map(tuple, specs)))
        out, back = jax.vjp(lambda x: linear(x, weight, (kernel.shape[0],), (OUT,)), x)
        return out, back(jnp.cos(out))[0]

    want = x @ kernel.dequantize()
    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        compiled = jax.jit(run).lower(x, kernel).compile()
    got, d_x = compiled(x, kernel)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    want = jnp.cos(want) @ kernel.dequantize().T
    np.testing.assert_allclose(d_x, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    arrays = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert any("= s8[" in line or "= u8[" in line for line in arrays), "gathered as they are stored"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("heads", ["none", "out", "in"])
def test_scales_after_the_product_round_nothing_but_the_kernel(dtype, heads):
    """Against float64; in bfloat16, only the result is rounded, to 8 bits."""
    kernel = quantize_kernel(kernel_of((IN, OUT)), "int8")
    x = jax.random.normal(jax.random.key(5), (BATCH, LENGTH, IN), dtype)
    shaped = x.reshape(BATCH, LENGTH, 4, IN // 4) if heads == "in" else x
    out_features = (OUT // 16, 16) if heads == "out" else (OUT,)
    got = linear(shaped, Weight(kernel, einsum=scaled_einsum), shaped.shape[2:], out_features)
    exact = np.asarray(kernel.qvalue, np.float64) * np.asarray(kernel.scale, np.float64)
    want = np.asarray(x, np.float64) @ exact
    sums = np.abs(np.asarray(x, np.float64)) @ np.abs(exact)  # of magnitudes, to which rounding is relative
    rounding = 2.0**-8 * np.abs(want) if dtype == jnp.bfloat16 else 0
    assert got.dtype == dtype and got.shape == (BATCH, LENGTH, *out_features)
    assert (np.abs(np.asarray(got, np.float64).reshape(want.shape) - want) <= rounding + 1e-6 * sums).all()
    whole = scaled_einsum("abi,io->abo", x, kernel, jnp.float32)
    assert whole.dtype == jnp.float32
    np.testing.assert_array_less(np.abs(np.asarray(whole, np.float64) - want), 1e-6 * sums)


@pytest.mark.parametrize("spec", ["abi,io->abo", "abi,oi->abo", "abi,ijo->abjo", "abhi,hio->abo"])
def test_a_large_kernel_is_converted_in_blocks(spec, monkeypatch):
    """Blocks of columns, of which the last one is smaller."""
    monkeypatch.setattr(quantized, "_MAX_CONVERTED", 100)
    monkeypatch.setattr(quantized, "_BLOCK", 13 * IN)
    kernel = quantize_kernel(kernel_of((IN, OUT)), "int8")
    x = jax.random.normal(jax.random.key(5), (BATCH, LENGTH, IN))
    want = np.asarray(x, np.float64) @ np.asarray(kernel.dequantize(), np.float64)
    if "oi" in spec:
        kernel = kernel.T
    if "j" in spec:
        kernel = kernel.reshape(IN, -1, 16)
    if "h" in spec:
        x, kernel = x.reshape(BATCH, LENGTH, 4, -1), kernel.reshape(4, IN // 4, OUT)
    run = jax.jit(lambda x: scaled_einsum(spec, x, kernel))
    np.testing.assert_allclose(run(x).reshape(want.shape), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert "while" in run.lower(x).compile().as_text(), "converted at once"


@pytest.mark.parametrize("stored", [None, ("tensor", "fsdp"), ("tensor", None), (("fsdp", "tensor"), None)])
def test_a_table_with_one_scale_per_row(stored):
    """Its rows are embeddings, and its transpose is a head."""
    table = kernel_of((IN, OUT)).T
    found = quantize_table(table)
    np.testing.assert_array_equal(found.T.dequantize(), by_qwix(table.T[None], "int8")[0])
    np.testing.assert_array_equal(found.dequantize(), found.T.dequantize().T)
    ids = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, OUT)
    want = np.asarray(found.dequantize())[np.asarray(ids)]
    if stored is None:
        np.testing.assert_array_equal(lookup(ids, found, jnp.float32), want)
        return
    mesh = compat.make_mesh([2, 2, 1, 2], MESH_AXES, jax.devices()[:8])
    specs = PartitionSpec(*stored), PartitionSpec(stored[0], None)
    placed = QuantizedKernel(*(NamedSharding(mesh, spec) for spec in specs), "int8", found.dtype)
    table = jax.device_put(found, placed)
    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        weight = Weight(table, tuple(map(tuple, specs)))
        got = jax.jit(lambda ids, weight: lookup(ids, weight, jnp.float32))(ids, weight)
    np.testing.assert_array_equal(got, want)
