"""Every implementation that runs on a CPU, on random packed rows: against the textbook formula and its
gradient in float64, and for leaks between samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.test_attention import inputs
from vilam3_jax.config import ACTIVATION_RULES
from vilam3_jax.errors import UserError
from vilam3_jax.ops import attention as attention_lib
from vilam3_jax.ops import attention_blockwise, attention_cudnn, attention_splash
from vilam3_jax.ops.attention import attention
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes

IMPLEMENTATIONS = ("short", "blockwise", "splash", "exchange", "exchange_splash", "ring")


@pytest.fixture
def run(monkeypatch):
    """`run(implementation, function, *args)`, jitted anew; blocks are small, so that rows have several."""
    monkeypatch.setattr(attention_splash, "INTERPRET", True)
    monkeypatch.setattr(attention_splash, "BLOCK", 128)
    monkeypatch.setattr(attention_splash, "COMPUTE_BLOCK", 128)
    monkeypatch.setattr(attention_splash, "MAX_FUSED", 128)
    monkeypatch.setattr(attention_blockwise, "BLOCK", 16)

    def run(implementation, function, *args, fsdp=1, context=2, tensor=1, **rules):
        split = implementation in ("exchange", "exchange_splash", "ring")
        mesh = compat.make_mesh(
            (fsdp, context if split else 1, tensor),
            ("fsdp", "context", "tensor"),
            jax.devices()[: fsdp * tensor * (context if split else 1)],
        )
        rules = {**ACTIVATION_RULES, "batch": "fsdp", "length": "context" if split else None, **rules}
        monkeypatch.setattr(attention_lib, "MAX_SHORT", 10**6 if implementation == "short" else 8)
        choice = {"splash": "splash", "exchange_splash": "splash", "ring": "ring"}.get(implementation, "xla")
        with logical_axes.activation_rules(mesh, rules, choice):
            return jax.jit(lambda *values: function(*values))(*args)

    return run


def rows_of_segments(rng, rows, length):
    """Samples of random sizes, numbered in order; some rows end in padding, one may have no sample."""
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        end = length if rng.random() < 0.5 else int(rng.integers(0, length))
        cuts = np.sort(rng.integers(0, max(end, 1), int(rng.integers(0, 4))))
        row[:end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
    return ids


def textbook(q, k, v, mask, d_out):
    """Plain attention and its gradients in float64, a head at a time; a query without keys gives zeros."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        own, key = (b, slice(None), h), (b, slice(None), h // group)
        scores = q[own] @ k[key].T * scale
        weights = np.exp(scores - scores.max(axis=1, keepdims=True)) * mask[b]
        total = weights.sum(axis=1, keepdims=True)
        weights /= np.where(total == 0, 1, total)
        d_weights = d_out[own] @ v[key].T
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True)) * scale
        out[own] = weights @ v[key]
        d_q[own] = d_scores @ k[key]
        d_k[key] += d_scores.T @ q[own]
        d_v[key] += weights.T @ d_out[own]
    return out, d_q, d_k, d_v


def allowed(ids, causal):
    mask = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None]
    return mask & np.tri(ids.shape[1], dtype=bool) if causal else mask


def output_and_gradients(function, weight):
    def total(*values):
        out = function(*values)
        return (out * weight).sum(), out

    both = jax.value_and_grad(total, (0, 1, 2), has_aux=True)

    def flat(*values):
        (_, out), gradients = both(*values)
        return out, *gradients

    return flat


def front(ids, causal):
    ids = jnp.asarray(ids)
    return lambda q, k, v: attention(
        q, k, v, segment_ids_q=ids, segment_ids_kv=ids, causal=causal, length="length"
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_packed_rows_match_the_textbook_in_float64(run, implementation, seed):
    rng = np.random.default_rng(seed)
    kv_heads, group = ((2, 1), (2, 3), (1, 4))[seed]
    length = (
        int(rng.integers(9, 90)) * 2 if "splash" not in implementation else 2 * int(rng.integers(40, 150))
    )
    causal, width = bool(seed % 3), (8, 24)[seed % 2]
    ids = rows_of_segments(rng, 2, length)
    q, k, v = inputs(q_len=length, heads=kv_heads * group, kv_heads=kv_heads, width=width, seed=seed)
    weight = rng.standard_normal(q.shape, np.float32)
    got = run(implementation, output_and_gradients(front(ids, causal), weight), q, k, v)
    for name, value, want in zip(
        ("out", "q", "k", "v"), got, textbook(q, k, v, allowed(ids, causal), weight), strict=True
    ):
        np.testing.assert_allclose(value, want, atol=3e-5, rtol=1e-5, err_msg=name)
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
    function = output_and_gradients(front(ids, causal), weight)
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
    ids = rows_of_segments(np.random.default_rng(3), 2, length)
    q, k, v = inputs(q_len=length, heads=heads, kv_heads=kv_heads)
    weight = np.random.default_rng(5).standard_normal(q.shape, np.float32)
    got = run(implementation, output_and_gradients(front(ids, causal), weight), q, k, v, **mesh)
    for name, value, want in zip(
        ("out", "q", "k", "v"), got, textbook(q, k, v, allowed(ids, causal), weight), strict=True
    ):
        np.testing.assert_allclose(value, want, atol=3e-5, rtol=1e-5, err_msg=name)


def test_long_rows_with_positions_are_as_short_ones(run):
    q, k, v = inputs(q_len=40, kv_len=75)
    slots = jnp.asarray(np.arange(40) + np.array([[3], [30]]))

    def cached(q, k, v):
        return attention(q, k, v, causal=True, q_positions=slots, kv_positions=jnp.arange(75)[None])

    np.testing.assert_allclose(run("blockwise", cached, q, k, v), run("short", cached, q, k, v), atol=2e-6)


def test_no_array_of_a_long_row_is_as_large_as_its_square():
    length = 8192
    q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    k = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    ids = jnp.ones((1, length), jnp.int32)
    function = output_and_gradients(front(ids, True), 1.0)
    compiled = jax.jit(function).lower(q, k, k).compile()
    linear = 3 * length * 2 * 16 * 4  # an array like q, a few times
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * linear < length**2 * 4 / 10


def test_blocks_that_packing_separates_are_not_computed():
    ids = jnp.repeat(jnp.asarray([1, 1, 2, 0]), 4).reshape(4, 1, 4)
    positions = jnp.arange(16).reshape(4, 1, 4)
    marks = attention_blockwise._Marks(ids, ids, positions, positions)
    keys = attention_blockwise._Keys(ids, ids, ids, positions)
    np.testing.assert_array_equal(
        attention_blockwise._needed(marks, keys, True).astype(int),
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
    )


def test_what_a_step_cannot_run_is_refused(run):
    q, k, v = inputs(q_len=30, heads=3, kv_heads=3)
    ids = np.ones((2, 30), np.int32)
    with pytest.raises(UserError, match="3 query and 3 key heads do not split into 2"):
        run("exchange_splash", front(ids, True), q, k, v)
    with pytest.raises(UserError, match="rows of 30 do not split into 4"):
        run("ring", front(ids, True), q, k, v, context=4)


def test_cudnn_gets_a_mask_that_keeps_samples_apart():
    ids = rows_of_segments(np.random.default_rng(1), 3, 50)
    for causal in (True, False):
        given = np.asarray(attention_cudnn.mask(jnp.asarray(ids), jnp.asarray(ids), causal))
        real = ids != 0
        np.testing.assert_array_equal(given[:, 0] & real[:, :, None], allowed(ids, causal))
        assert given.any(axis=-1).all(), "a query that sees nothing would be NaN"
        assert not (given[:, 0] & real[:, None] & ~real[:, :, None]).any()


@pytest.mark.parametrize("causal", [True, False])
def test_the_path_to_cudnn_gives_what_xla_gives(run, monkeypatch, causal):
    """With XLA behind the same public function, as no GPU is here."""
    plain = jax.nn.dot_product_attention
    seen = []

    def instead(*args, implementation, **options):
        seen.append(implementation)
        assert args[0].shape[1] % 2 == 0 == args[1].shape[1] % 2
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(logical_axes, "platform", lambda: "gpu")
    ids = rows_of_segments(np.random.default_rng(2), 2, 151)
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(q_len=151))
    mesh = compat.make_mesh((2, 2), ("fsdp", "tensor"), jax.devices()[:4])
    weight = np.random.default_rng(5).standard_normal(q.shape, np.float32)
    function = output_and_gradients(front(ids, causal), weight)
    with logical_axes.activation_rules(mesh, {**ACTIVATION_RULES, "batch": "fsdp", "length": None}):
        got = jax.jit(lambda *x: function(*x))(q, k, v)
    assert seen == ["cudnn"]
    for name, value, want in zip(
        ("out", "q", "k", "v"), got, textbook(q, k, v, allowed(ids, causal), weight), strict=True
    ):
        np.testing.assert_allclose(value.astype(np.float32), want, atol=0.05, rtol=0.02, err_msg=name)


def test_cudnn_is_refused_where_it_cannot_run():
    q, k, v = inputs()
    mesh = compat.make_mesh((1, 1), ("fsdp", "tensor"), jax.devices()[:1])
    with (
        logical_axes.activation_rules(mesh, {**ACTIVATION_RULES, "batch": "fsdp"}, "cudnn"),
        pytest.raises(UserError, match="kernel for NVIDIA GPUs, and the devices are cpu"),
    ):
        attention(q, k, v, causal=True)
    assert "bfloat16" in attention_cudnn.refusal(q)
    assert "head size" in attention_cudnn.refusal(jnp.zeros((1, 2, 3, 256), jnp.bfloat16))
