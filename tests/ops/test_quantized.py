"""Quantised matmuls: against Qwix on a Flax layer, and sharded against unsharded."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.models.layers import Linear
from vilam3_jax.ops import quantized
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES
from vilam3_jax.sharding.matmul import linear
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.sharding.weights import Weight

qwix = pytest.importorskip("qwix")
BATCH, LENGTH, HEADS, HEAD_DIM, OUT = 8, 6, 4, 64, 48
IN = HEADS * HEAD_DIM
TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
CASES = [(kind, gradients) for kind in TYPES for gradients in (False, True)]


def normal(shape, seed, dtype=jnp.float32):
    # Magnitudes differ by token and channel, so that scales along the wrong axis show.
    x = jax.random.normal(jax.random.key(seed), shape)
    wide = jnp.exp(jax.random.normal(jax.random.key(seed + 100), (*shape[:-1], 1)))
    return (x * wide * jnp.linspace(0.3, 3, shape[-1])).astype(dtype)


def factors(dtype=jnp.float32):
    return normal((BATCH, LENGTH, IN), 0, dtype), normal((IN, OUT), 1, dtype), normal((BATCH, LENGTH, OUT), 2)


def by_qwix(kind, gradients, x, kernel, direction):
    """(out, d_x, d_kernel) of an `nnx.Linear` under Qwix's own provider."""
    layer = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0), dtype=x.dtype, param_dtype=kernel.dtype)
    layer.kernel.set_value(kernel)
    forward, backward = TYPES[kind]
    rule = qwix.QtRule(
        module_path=".*",
        weight_qtype=forward,
        act_qtype=forward,
        bwd_qtype=backward if gradients else None,
    )
    layer = qwix.quantize_model(layer, qwix.QtProvider([rule]), x)
    graphdef, state = nnx.split(layer)

    def forward_pass(x, state):
        return nnx.merge(graphdef, state)(x)

    out, back = jax.vjp(forward_pass, x, state)
    d_x, d_state = back(direction.astype(out.dtype))
    return out, d_x, jax.tree.leaves(d_state)[0]


def ours(kind, gradients, x, kernel, direction, out_features=(OUT,)):
    how = quantized.QuantizedMatmul(kind, gradients)

    def product(x, kernel):
        return linear(x, Weight(kernel, einsum=how), x.shape[2:], out_features)

    out, back = jax.vjp(product, x, kernel)
    return out, *back(direction.astype(out.dtype).reshape(out.shape))


@pytest.mark.parametrize("kind, gradients", CASES)
def test_forward_and_gradients_are_those_of_qwix(kind, gradients):
    arrays = factors()
    want, got = by_qwix(kind, gradients, *arrays), ours(kind, gradients, *arrays)
    x, kernel, direction = map(partial(np.asarray, dtype=np.float64), arrays)
    plain = x @ kernel, direction @ kernel.T, np.einsum("abi,abo->io", x, direction)
    for index, (a, b, c) in enumerate(zip(got, want, plain, strict=True)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
        error = np.linalg.norm(a - c) / np.linalg.norm(c)
        if index == 0 or gradients:
            assert 1e-3 < error < 0.1, error
        else:  # straight-through gradients in full precision
            assert error < 1e-5, error


@pytest.mark.parametrize("kind, gradients", CASES)
def test_heads_change_no_scale(kind, gradients):
    x, kernel, direction = factors()
    want = ours(kind, gradients, x, kernel, direction)
    got = ours(kind, gradients, x, kernel, direction, out_features=(OUT // 16, 16))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-6, atol=1e-5 * np.abs(b).max())
    got = ours(kind, gradients, x.reshape(BATCH, LENGTH, HEADS, HEAD_DIM), kernel, direction)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-6, atol=1e-5 * np.abs(b).max())


def test_a_frozen_kernel_costs_no_product():
    x, kernel, _ = factors()
    how = quantized.QuantizedMatmul("int8", True)
    text = (
        jax.jit(jax.grad(lambda x: quantized.einsum(how, "abi,io->abo", x, kernel).sum())).lower(x).as_text()
    )
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 1 and "xi8>" in products[0], products  # the value is unused


def test_bfloat16_is_scaled_in_float32():
    x, kernel, direction = factors(jnp.bfloat16)
    wide = [array.astype(jnp.float32) for array in (x, kernel)]
    out, d_x, d_kernel = ours("int8", True, x, kernel, direction.astype(jnp.bfloat16))
    want = ours("int8", True, *wide, direction.astype(jnp.bfloat16).astype(jnp.float32))
    assert out.dtype == d_x.dtype == d_kernel.dtype == jnp.bfloat16
    for a, b in zip((out, d_x, d_kernel), want, strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def sharded(kind, gradients, axes, stored, x, kernel, direction):
    mesh = compat.make_mesh([axes.get(axis, 1) for axis in MESH_AXES], MESH_AXES, jax.devices()[:8])
    placed = NamedSharding(mesh, PartitionSpec(*stored))

    def run(x, kernel, direction):
        how = quantized.QuantizedMatmul(kind, gradients)
        out, back = jax.vjp(
            lambda x, kernel: linear(x, Weight(kernel, (stored,), how), (IN,), (OUT,)), x, kernel
        )
        return out, *back(direction)

    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        lowered = jax.jit(run, in_shardings=(None, placed, None)).lower(x, kernel, direction)
        return lowered.compile()(*jax.device_put((x, kernel, direction), (None, placed, None)))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("axes, stored", [
    (dict(data=2, fsdp=2, tensor=2), ("fsdp", "tensor")),
    (dict(fsdp=4, data=2), ("fsdp", None)),
    (dict(fsdp=2, data=2, tensor=2), (None, "fsdp")),
])  # fmt: skip
def test_sharded_is_unsharded(kind, axes, stored):
    """When each device holds whole contractions; kernel gradients are summed in full precision."""
    arrays = factors()
    for a, b in zip(sharded(kind, False, axes, stored, *arrays), ours(kind, False, *arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("kind", TYPES)
def test_rows_split_over_tensor_are_tiles(kind):
    """Each device scales its part of a contraction separately, like Qwix's tiles (here of 128 rows)."""
    x, kernel, direction = factors()
    got = sharded(kind, False, dict(fsdp=2, data=2, tensor=2), ("tensor", "fsdp"), x, kernel, direction)
    tiles = dict(tiled_axes={2: IN // 2}, channelwise_axes=(0, 1))
    q_x = qwix.quantize(x, TYPES[kind][0], **tiles)
    q_kernel = qwix.quantize(kernel, TYPES[kind][0], tiled_axes={0: IN // 2}, channelwise_axes=(1,))
    want = qwix.dot_general(q_x, q_kernel, (((2,), (0,)), ((), ())))
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    for a, b in zip(got[1:], ours(kind, False, x, kernel, direction)[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("kind", TYPES)
def test_quantised_gradients_sharded(kind):
    """Only a kernel's gradient differs from the unsharded one: each device scales its own tokens."""
    arrays = factors()
    got = sharded(kind, True, dict(data=2, fsdp=4), ("fsdp", None), *arrays)
    out, d_x, whole = ours(kind, True, *arrays)
    rows = [ours(kind, True, arrays[0][i : i + 1], arrays[1], arrays[2][i : i + 1])[2] for i in range(BATCH)]
    for a, b in zip(got, (out, d_x, sum(rows)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    assert np.abs(got[2] - whole).max() > 1e-3 * np.abs(whole).max()


def test_without_qwix_the_key_is_named(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"quantization\.matmul.*\.\[quant\]"):
        quantized.check_installed("config quantization.matmul", "leave the key empty")


def test_adapters_stay_exact():
    layer = Linear(
        IN, OUT, rngs=nnx.Rngs(params=0, lora=1), dtype="float32", param_dtype="float32", lora_rank=2
    )
    layer.kernel.set_value(Weight(layer.kernel.get_value(), einsum=quantized.QuantizedMatmul("int8")))
    layer.lora_b.set_value(normal((2, OUT), 5))
    x = factors()[0]
    text = jax.jit(lambda x: layer(x)).lower(x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert sum("xi8>" in line for line in products) == 1 and len(products) == 3
