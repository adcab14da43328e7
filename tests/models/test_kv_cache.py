"""The cache of keys and values, in int8 against its definition in NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.models import kv_cache

pytest.importorskip("qwix")
LAYERS, ROWS, SIZE, HEADS, WIDTH = 3, 2, 6, 2, 8


def empty(dtype="int8"):
    return kv_cache.empty(LAYERS, ROWS, SIZE, HEADS, WIDTH, kv_cache.dtype_of(dtype))


def vectors(seed, length=4):
    """Keys and values whose sizes differ by orders of magnitude, with a vector of zeros."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, ROWS, length, HEADS, WIDTH)) * np.exp(
        rng.normal(size=(2, ROWS, length, HEADS, 1)) * 3
    )
    k[0, 0, 0] = 0
    return jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)


def rounded(x):
    """One scale for each vector: its largest magnitude is 127 steps."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    scale[scale == 0] = 1
    return np.round(x / scale) * scale, scale


def test_int8_has_one_scale_for_each_position_and_head():
    k, v = vectors(0)
    slots = jnp.asarray([[1, 2, 3, 4], [3, 4, 5, 6]])  # the last one is beyond the cache
    cache = kv_cache.write(empty(), jnp.int32(1), slots, k, v)
    assert {name: x.dtype.name for name, x in cache.items()} == {
        "k": "int8", "v": "int8", "k_scale": "float32", "v_scale": "float32"
    }  # fmt: skip
    for given, read in zip((k, v), kv_cache.read(cache, jnp.int32(1), jnp.float32), strict=True):
        want, scale = rounded(given)
        np.testing.assert_allclose(read[0, 1:5], want[0], rtol=1e-6)
        np.testing.assert_allclose(read[1, 3:], want[1, :3], rtol=1e-6)
        assert not np.asarray(read[0, [0, 5]]).any() and not np.asarray(read[1, :3]).any()
        gap = np.abs(np.asarray(read[0, 1:5]) - np.asarray(given[0]))
        assert (gap <= scale[0] * 0.5001).all() and gap.max() > 0
    for other in (0, 2):
        assert not np.asarray(cache["k"][other]).any()


@pytest.mark.parametrize("dtype", kv_cache.CACHE_DTYPES)
def test_a_longer_cache_holds_the_same(dtype):
    k, v = vectors(1)
    slots = jnp.arange(4)[None].repeat(ROWS, 0)
    cache = kv_cache.write(empty(dtype), jnp.int32(2), slots, k, v)
    longer = kv_cache.lengthen(cache, SIZE + 3)
    assert longer["k"].shape == (LAYERS, ROWS, HEADS, SIZE + 3, WIDTH)
    for short, long in zip(
        *(kv_cache.read(x, jnp.int32(2), jnp.float32) for x in (cache, longer)), strict=True
    ):
        np.testing.assert_array_equal(long[:, :SIZE], short)
        assert not np.asarray(long[:, SIZE:]).any()


@pytest.mark.parametrize("dtype", kv_cache.CACHE_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_found(dtype, bad):
    k, v = vectors(2)
    slots = jnp.arange(4)[None].repeat(ROWS, 0)
    cache = kv_cache.write(empty(dtype), jnp.int32(0), slots, k, v.at[1, 2, 1, 3].set(bad))
    found = np.argwhere(np.asarray(kv_cache.not_finite(cache)))
    assert found.tolist() == [[0, 1, 2]]


def test_bytes_of_a_position():
    """64 numbers and a scale: 68 bytes instead of 128."""
    sizes = {
        dtype: sum(x.nbytes for x in kv_cache.empty(2, 2, 16, 2, 64, kv_cache.dtype_of(dtype)).values())
        for dtype in kv_cache.CACHE_DTYPES
    }
    assert sizes["float32"] == 2 * sizes["bfloat16"] and sizes["int8"] * 128 == sizes["bfloat16"] * 68


def test_an_unknown_type_is_refused():
    with pytest.raises(UserError, match="cache_dtype 'int4': must be float32, bfloat16 or int8"):
        kv_cache.dtype_of("int4")
