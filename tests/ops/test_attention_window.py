"""Sliding windows of every backend: values and gradients against the dense formula in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention_reference import (
    assert_close,
    dense,
    dense_mask,
    dense_with_gradients,
    inputs,
    random_segments,
    self_attention,
    with_gradients,
)
from vilam3_jax.ops.attention import MaskInfo, attention, backends, blockwise, cudnn, splash, xla
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES

# Rows of three blocks of queries or more: 64 of a short row, 16 blockwise, 128 of the kernel.
LENGTHS = dict(short=150, blockwise=90, splash=300, exchange=92, exchange_splash=300, ring=92)


def close_to_dense(run, implementation, ids, window, num_heads=4, num_kv_heads=2, **mesh):
    q, k, v = inputs(q_len=ids.shape[1], heads=num_heads, kv_heads=num_kv_heads, seed=window)
    weight = np.random.default_rng(5).standard_normal(q.shape, np.float32)
    function = with_gradients(self_attention(ids, causal=True, window=window), weight)
    got = run(implementation, function, q, k, v, **mesh)
    want = dense_with_gradients(q, k, v, dense_mask(ids, True, window), weight)
    assert_close(got, want, atol=3e-5, rtol=1e-5)
    return q, k, v, got


# 17 and 70 cross blocks; 1000 exceeds every row.
@pytest.mark.parametrize("window", [1, 17, 70, 1000])
@pytest.mark.parametrize("implementation", LENGTHS)
def test_a_window_matches_the_dense_formula(run, implementation, window):
    length = LENGTHS[implementation]
    ids = random_segments(np.random.default_rng(window), 2, length)
    ids[0] = np.repeat([1, 2], [length - 20, 20])  # one sample is longer than the windows
    q, k, v, (out, *gradients) = close_to_dense(run, implementation, ids, window)
    assert np.all(np.asarray(out)[ids == 0] == 0)
    if window == 1:  # every token sees itself alone
        np.testing.assert_allclose(out[0], np.repeat(v[0], 2, axis=1), atol=1e-6)
    if window == 1000:
        weight = np.random.default_rng(5).standard_normal(q.shape, np.float32)
        full = run(implementation, with_gradients(self_attention(ids, causal=True), weight), q, k, v)
        assert_close((out, *gradients), full, atol=1e-6)


def test_a_window_of_an_unpacked_row(run):
    q, k, v = inputs(q_len=150)
    mask = dense_mask(np.ones((2, 150), int), True, 40)
    for implementation in ("short", "blockwise", "splash", "ring"):
        got = run(implementation, self_attention(causal=True, window=40), q, k, v)
        np.testing.assert_allclose(got, dense(q, k, v, mask), atol=3e-6, err_msg=implementation)


@pytest.mark.parametrize("window", [1, 40])
@pytest.mark.parametrize(
    "implementation, heads, kv_heads, mesh",
    [
        ("short", 8, 2, dict(fsdp=2, tensor=4)),
        ("short", 3, 1, dict(fsdp=2, tensor=4, heads=None, kv_heads=None, queries="tensor")),
        ("blockwise", 3, 1, dict(tensor=4, heads=None, kv_heads=None, queries="tensor")),
        ("splash", 3, 1, dict(fsdp=2, tensor=4, heads=None, kv_heads=None, queries="tensor")),
        ("exchange", 8, 1, dict(fsdp=2, context=2, tensor=2)),
        ("exchange_splash", 8, 2, dict(context=2, tensor=2)),
        ("ring", 6, 2, dict(fsdp=2, context=2, tensor=2)),
        ("ring", 3, 3, dict(context=8)),  # parts of odd length, which are not balanced
    ],
)
def test_a_window_on_a_mesh(run, implementation, heads, kv_heads, mesh, window):
    ids = random_segments(np.random.default_rng(3), 2, 200)
    ids[0] = 1
    close_to_dense(run, implementation, ids, window, heads, kv_heads, **mesh)


@pytest.mark.parametrize("window", [1, 20, 100])
@pytest.mark.parametrize("implementation", ["short", "blockwise"])
def test_cached_keys_are_compared_by_position(run, implementation, window):
    q, k, v = inputs(q_len=40, kv_len=75)
    slots = np.arange(40) + np.array([[3], [30]])

    def cached(q, k, v):
        mask = MaskInfo(
            q_positions=jnp.asarray(slots), kv_positions=jnp.arange(75)[None], causal=True, window=window
        )
        return attention(q, k, v, mask)

    distance = slots[:, :, None] - np.arange(75)
    want = dense(q, k, v, (distance >= 0) & (distance < window))
    np.testing.assert_allclose(run(implementation, cached, q, k, v), want, atol=2e-6)


def test_positions_without_a_key_in_the_window_give_zeros(run):
    q, k, v = inputs(q_len=3, kv_len=9)
    slots = jnp.asarray([[4, 8, 20]])  # keys end at 8

    def cached(q, k, v):
        mask = MaskInfo(q_positions=slots, kv_positions=jnp.arange(9)[None], causal=True, window=5)
        return attention(q, k, v, mask)

    for implementation in ("short", "blockwise"):
        out = np.asarray(run(implementation, cached, q, k, v))
        assert np.all(out[:, 2] == 0) and np.all(np.abs(out[:, :2]).sum(axis=(2, 3)) > 0)


@pytest.mark.parametrize("window", [1, 13, 100])
def test_the_mask_of_cudnn(window):
    ids = random_segments(np.random.default_rng(1), 3, 50)
    given = np.asarray(
        cudnn.boolean_mask(MaskInfo(jnp.asarray(ids), jnp.asarray(ids), causal=True, window=window))
    )
    real = ids != 0
    np.testing.assert_array_equal(given[:, 0] & real[:, :, None], dense_mask(ids, True, window))
    assert given.any(axis=-1).all(), "a query without a key would be NaN"


@pytest.mark.parametrize("window", [1, 40, 1000])
def test_the_call_of_cudnn(monkeypatch, window):
    """XLA stands in for the kernel behind the same public function."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *x, implementation, **options: plain(*x, **options)
    )
    monkeypatch.setattr(logical_axes, "platform", lambda: "gpu")
    ids = random_segments(np.random.default_rng(2), 2, 151)
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(q_len=151))
    weight = np.random.default_rng(5).standard_normal(q.shape, np.float32)
    mesh = compat.make_mesh((2, 2), ("fsdp", "tensor"), jax.devices()[:4])
    rules = {**ACTIVATION_RULES, "batch": "fsdp", "length": None}
    function = with_gradients(self_attention(ids, causal=True, window=window), weight)
    with logical_axes.activation_rules(mesh, rules), backends.use("cudnn"):
        got = jax.jit(function)(q, k, v)
    want = dense_with_gradients(q, k, v, dense_mask(ids, True, window), weight)
    assert_close(got, want, atol=0.05, rtol=0.02)


def test_blocks_beyond_the_window_are_not_computed():
    ids, positions = jnp.ones((4, 1, 4), int), jnp.arange(16).reshape(4, 1, 4)
    keys = blockwise._Keys(ids, ids, ids, positions)

    def needed(window):
        mask = MaskInfo(ids, ids, positions, positions, causal=True, window=window)
        return blockwise._needed(mask, keys).astype(int).tolist()

    assert needed(1) == np.eye(4, dtype=int).tolist()
    # The first query of a block sees the last key of the block before.
    assert needed(2) == needed(5) == (np.eye(4, dtype=int) + np.eye(4, k=-1, dtype=int)).tolist()
    assert needed(6) == (np.tri(4, dtype=int) - np.tri(4, k=-3, dtype=int)).tolist()
    assert needed(13) == needed(None) == needed(100) == np.tri(4, dtype=int).tolist()


def test_short_rows_read_only_the_keys_of_their_window():
    keys = jnp.zeros((1, 1, 200, 8))

    def seen(window):
        mask = MaskInfo(causal=True, window=window)
        slices = [xla._keys_of_block(i, keys, mask, 64) for i in range(4)]
        return [(keys.start, keys.stop) for keys in slices]

    assert seen(1) == [(0, 64), (64, 128), (128, 192), (192, 200)]
    assert seen(10) == [(0, 64), (55, 128), (119, 192), (183, 200)]
    assert seen(1000) == seen(None) == [(0, 64), (0, 128), (0, 192), (0, 200)]


def test_the_tpu_kernel_skips_blocks_beyond_the_window(monkeypatch):
    """Of 4 x 4 blocks the window leaves two in each row but the first."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "COMPUTE_BLOCK", 128)

    def blocks(window):
        kernel = splash.make_kernel(np.arange(512), 512, 1, MaskInfo(causal=True, window=window), 1)
        return int((np.asarray(kernel.fwd_mask_info.block_mask) > 0).sum())

    assert (blocks(None), blocks(128), blocks(1)) == (10, 7, 4)
