"""The TPU kernel for single queries, interpreted on the CPU, against XLA's attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax.ops.attention import MaskInfo, attention, cached

LAYERS, KV_HEADS, SIZE, WIDTH = 3, 2, 384, 128


def arrays(rows, heads, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    cache = (LAYERS, rows, KV_HEADS, SIZE, WIDTH)
    shapes = ((rows, 1, heads, WIDTH), cache, cache)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [2, 14])
def test_equals_xla(heads, window):
    """Rows with one slot, up to the end of a block, within one, with all slots, and beyond the cache."""
    slots = jnp.asarray([0, 127, 200, SIZE - 1, SIZE])
    q, k, v = arrays(len(slots), heads, jnp.float32)
    run = jax.jit(functools.partial(cached._attend, window=window, interpret=True))
    found = run(q, k, v, jnp.asarray([1]), slots)
    mask = MaskInfo(
        q_positions=slots[:, None], kv_positions=jnp.arange(SIZE)[None], causal=True, window=window
    )
    want = attention(q, k[1].swapaxes(1, 2), v[1].swapaxes(1, 2), mask, scale=1.0)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_what_lies_beyond_a_row_is_not_read():
    """Old keys and values of a slot may be anything, such as those of an earlier dialogue."""
    slots = jnp.asarray([100, 300])
    q, k, v = arrays(2, 4, jnp.float32)
    beyond = jnp.arange(SIZE) > slots[:, None]
    spoilt = [jnp.where(beyond[None, :, None, :, None], 1e4, x) for x in (k, v)]
    run = functools.partial(cached._attend, layer=jnp.asarray([2]), slots=slots, window=None, interpret=True)
    np.testing.assert_array_equal(run(q, *spoilt), run(q, k, v))


@pytest.mark.parametrize(
    "change",
    [dict(queries=2), dict(dtype=jnp.int8), dict(width=64), dict(size=200)],
    ids=str,
)
def test_other_calls_are_left_to_xla(change, monkeypatch):
    monkeypatch.setattr(cached.logical_axes, "platform", lambda: "tpu")
    how = dict(queries=1, dtype=jnp.bfloat16, width=128, size=256)

    def supported(queries, dtype, width, size):
        q = jax.ShapeDtypeStruct((2, queries, 4, width), jnp.bfloat16)
        return cached.supports(q, jax.ShapeDtypeStruct((3, 2, 2, size, width), dtype))

    assert supported(**how) and not supported(**(how | change))


def test_not_on_other_platforms():
    q, k, _ = arrays(1, 2, jnp.float32)
    assert not cached.supports(q, k)
