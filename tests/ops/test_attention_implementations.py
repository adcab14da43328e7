"""Every implementation that runs on a CPU, on random packed rows: values and gradients against the dense
formula in float64, and leaks between samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention_reference import (
    assert_close,
    dense_mask,
    dense_with_gradients,
    inputs,
    random_segments,
    self_attention,
    with_gradients,
)
from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention import MaskInfo, attention, backends, blockwise, cudnn
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES

IMPLEMENTATIONS = ("short", "blockwise", "splash", "exchange", "exchange_splash", "ring")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_packed_rows_match_the_textbook_in_float64(run, implementation, seed):
    rng = np.random.default_rng(seed)
    kv_heads, group = ((2, 1), (2, 3), (1, 4))[seed]
    length = (
        int(rng.integers(9, 90)) * 2 if "splash" not in implementation else 2 * int(rng.integers(40, 150))
    )
    causal, width = bool(seed % 3), (8, 24)[seed % 2]
    ids = random_segments(rng, 2, length)
    q, k, v = inputs(q_len=length, heads=kv_heads * group, kv_heads=kv_heads, width=width, seed=seed)
    weight = rng.standard_normal(q.shape, np.float32)
    got = run(implementation, with_gradients(self_attention(ids, causal=causal), weight), q, k, v)
    want = dense_with_gradients(q, k, v, dense_mask(ids, causal), weight)
    assert_close(got, want, atol=3e-5, rtol=1e-5)
    assert np.all(np.asarray(got[0])[ids == 0] == 0)


@pytest.mark.parametrize(
    "implementation, causal",
    [*((name, True) for name in IMPLEMENTATIONS), ("blockwise", False), ("ring", False)],
)
def test_one_sample_moves_no_other_by_a_bit(run, implementation, causal):
    ids = np.repeat([[1, 2, 3, 0], [1, 2, 3, 0]], 40, axis=1)
    ids[0, 30:100], ids[1, 15:40] = 2, 2
    q, k, v = inputs(q_len=160)
    weight = np.random.default_rng(5).standard_normal(q.shape, np.float32)
    function = with_gradients(self_attention(ids, causal=causal), weight)
    changed = (ids == 2)[:, :, None, None]
    before = run(implementation, function, q, k, v)
    after = run(implementation, function, *(jnp.where(changed, x * 100 + 7, x) for x in (q, k, v)))
    for name, old, new in zip(("out", "q", "k", "v"), before, after, strict=True):
        np.testing.assert_array_equal(
            np.asarray(old)[ids != 2], np.asarray(new)[ids != 2], err_msg=f"{name} of another sample"
        )
        assert np.abs(np.asarray(old)[ids == 2] - np.asarray(new)[ids == 2]).max() > 0


@pytest.mark.parametrize(
    "implementation, heads, kv_heads, mesh",
    [
        ("blockwise", 4, 2, dict(fsdp=2, tensor=2)),
        ("blockwise", 3, 1, dict(tensor=4, heads=None, kv_heads=None, queries="tensor")),
        ("exchange", 8, 1, dict(fsdp=2, context=2, tensor=2)),  # key heads are repeated
        ("exchange", 4, 4, dict(context=4)),
        ("exchange_splash", 8, 2, dict(context=2, tensor=2)),
        ("ring", 3, 3, dict(fsdp=2, context=4)),
        ("ring", 6, 2, dict(fsdp=2, context=2, tensor=2)),
    ],
)
def test_meshes(run, implementation, heads, kv_heads, mesh):
    causal = True
    length = 120
    ids = random_segments(np.random.default_rng(3), 2, length)
    q, k, v = inputs(q_len=length, heads=heads, kv_heads=kv_heads)
    weight = np.random.default_rng(5).standard_normal(q.shape, np.float32)
    got = run(implementation, with_gradients(self_attention(ids, causal=causal), weight), q, k, v, **mesh)
    want = dense_with_gradients(q, k, v, dense_mask(ids, causal), weight)
    assert_close(got, want, atol=3e-5, rtol=1e-5)


def test_long_rows_with_positions_are_as_short_ones(run):
    q, k, v = inputs(q_len=40, kv_len=75)
    slots = jnp.asarray(np.arange(40) + np.array([[3], [30]]))

    def cached(q, k, v):
        mask = MaskInfo(q_positions=slots, kv_positions=jnp.arange(75)[None], causal=True)
        return attention(q, k, v, mask)

    np.testing.assert_allclose(run("blockwise", cached, q, k, v), run("short", cached, q, k, v), atol=2e-6)


def test_no_array_of_a_long_row_is_as_large_as_its_square():
    length = 8192
    q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    k = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    ids = jnp.ones((1, length), jnp.int32)
    function = with_gradients(self_attention(ids, causal=True), 1.0)
    compiled = jax.jit(function).lower(q, k, k).compile()
    linear = 3 * length * 2 * 16 * 4  # three arrays like q
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * linear < length**2 * 4 / 10


def test_blocks_that_packing_separates_are_not_computed():
    ids = jnp.repeat(jnp.asarray([1, 1, 2, 0]), 4).reshape(4, 1, 4)
    positions = jnp.arange(16).reshape(4, 1, 4)
    mask = MaskInfo(ids, ids, positions, positions, causal=True)
    keys = blockwise._Keys(ids, ids, ids, positions)
    np.testing.assert_array_equal(
        blockwise._needed(mask, keys).astype(int),
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
    )


def test_what_a_step_cannot_run_is_refused(run):
    q, k, v = inputs(q_len=30, heads=3, kv_heads=3)
    ids = np.ones((2, 30), np.int32)
    with pytest.raises(UserError, match="3 query and 3 key heads do not split into 2"):
        run("exchange_splash", self_attention(ids, causal=True), q, k, v)
    with pytest.raises(UserError, match="rows of 30 do not split into 4"):
        run("ring", self_attention(ids, causal=True), q, k, v, context=4)


def test_cudnn_gets_a_mask_that_keeps_samples_apart():
    ids = random_segments(np.random.default_rng(1), 3, 50)
    for causal in (True, False):
        given = np.asarray(cudnn.boolean_mask(MaskInfo(jnp.asarray(ids), jnp.asarray(ids), causal=causal)))
        real = ids != 0
        np.testing.assert_array_equal(given[:, 0] & real[:, :, None], dense_mask(ids, causal))
        assert given.any(axis=-1).all(), "a query without a key would be NaN"
        assert not (given[:, 0] & real[:, None] & ~real[:, :, None]).any()


@pytest.mark.parametrize("causal", [True, False])
def test_the_path_to_cudnn_gives_what_xla_gives(run, monkeypatch, causal):
    """XLA stands in for the kernel behind the same public function."""
    plain = jax.nn.dot_product_attention
    seen = []

    def instead(*args, implementation, **options):
        seen.append(implementation)
        assert args[0].shape[1] % 2 == 0 == args[1].shape[1] % 2
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(logical_axes, "platform", lambda: "gpu")
    ids = random_segments(np.random.default_rng(2), 2, 151)
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(q_len=151))
    mesh = compat.make_mesh((2, 2), ("fsdp", "tensor"), jax.devices()[:4])
    weight = np.random.default_rng(5).standard_normal(q.shape, np.float32)
    function = with_gradients(self_attention(ids, causal=causal), weight)
    with logical_axes.activation_rules(mesh, {**ACTIVATION_RULES, "batch": "fsdp", "length": None}):
        got = jax.jit(lambda *x: function(*x))(q, k, v)
    assert seen == ["cudnn"]
    want = dense_with_gradients(q, k, v, dense_mask(ids, causal), weight)
    assert_close(got, want, atol=0.05, rtol=0.02)


def test_cudnn_is_refused_where_it_cannot_run():
    q, k, v = inputs()
    mesh = compat.make_mesh((1, 1), ("fsdp", "tensor"), jax.devices()[:1])
    with (
        logical_axes.activation_rules(mesh, {**ACTIVATION_RULES, "batch": "fsdp", "length": None}),
        backends.use("cudnn"),
        pytest.raises(UserError, match="kernel for NVIDIA GPUs, and the devices are cpu"),
    ):
        attention(q, k, v, MaskInfo(causal=True))
    assert "bfloat16" in cudnn.refusal(q)
    assert "head size" in cudnn.refusal(jnp.zeros((1, 2, 3, 256), jnp.bfloat16))
