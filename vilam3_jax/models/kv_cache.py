"""The cache of keys and values: plain arrays, or int8 with one scale for every position and head.

A cache is a dict of arrays. `k` and `v` are [layers, batch, kv heads, size, head dim]. An int8 cache has
`k_scale` and `v_scale` beside them, float32 [layers, batch, kv heads, size]. This is the order of axes in
which attention reads them: in another one, a TPU copies the cache of a layer for every token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.models.model_config import DTYPES
from vilam3_jax.ops import quantized

CACHE_DTYPES = (*DTYPES, "int8")

Cache = dict[str, jax.Array]


def dtype_of(name: str) -> Any:
    """The type of a cache; raises UserError for an unknown one, or for int8 without Qwix."""
    if name not in CACHE_DTYPES:
        raise UserError(f"cache_dtype {name!r}: must be {', '.join(CACHE_DTYPES[:-1])} or int8")
    if name == "int8":
        quantized.check_installed("cache_dtype 'int8'", "choose another type")
    return jnp.dtype(name)


def empty(layers: int, batch: int, size: int, kv_heads: int, head_dim: int, dtype: Any) -> Cache:
    """A cache of zeros."""
    shape = (layers, batch, kv_heads, size, head_dim)
    cache = {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
    if dtype == jnp.int8:
        cache |= {f"{name}_scale": jnp.zeros(shape[:-1], jnp.float32) for name in ("k", "v")}
    return cache


def partition_specs(dtype: Any, batch: Any, heads: Any) -> dict[str, PartitionSpec]:
    """The PartitionSpec of each array, from the mesh axes of rows and heads."""
    names = ("k", "v", "k_scale", "v_scale") if dtype == jnp.int8 else ("k", "v")
    return dict.fromkeys(names, PartitionSpec(None, batch, heads))


def lengthen(cache: Cache, size: int) -> Cache:
    """Pads a cache to `size` positions."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, size - x.shape[3] if axis == 3 else 0) for axis in range(x.ndim)])

    return jax.tree.map(pad, cache)


def write(cache: Cache, layer: jax.Array, slots: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
    """Writes keys and values of one layer, [B, Q, K, hd] each, to slots [B, Q]; those beyond are dropped."""
    # An index for every head, too: else a TPU would order the axes as [..., size, K, hd].
    rows, heads = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(k.shape[2])[:, None]
    written = dict(cache)

    def put(name: str, x: jax.Array) -> None:
        # 'drop': padding may lie beyond the cache, and clamping would overwrite real slots.
        at = cache[name].at[layer, rows, heads, slots[:, None]]
        written[name] = at.set(x.astype(cache[name].dtype), mode="drop")

    for name, x in (("k", k), ("v", v)):
        x = x.swapaxes(1, 2)
        if cache[name].dtype == jnp.int8:
            x, scale = quantized.quantize_vectors(x)
            put(f"{name}_scale", scale)
        put(name, x)
    return written


def read(cache: Cache, layer: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer, [B, size, K, hd] each, in `dtype`."""

    def of_layer(name: str) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False)

    def values(name: str) -> jax.Array:
        x = of_layer(name)
        if x.dtype == jnp.int8:
            x = x.astype(jnp.float32) * of_layer(f"{name}_scale")[..., None]
        return x.astype(dtype).swapaxes(1, 2)

    return values("k"), values("v")


def not_finite(cache: Cache) -> jax.Array:
    """Bool [layers, batch, size]: which positions have a key or value that is NaN or infinite.

    The scale of an int8 vector with such a number is not finite, either.
    """
    found = []
    for x in cache.values():
        others = tuple(axis for axis in range(2, x.ndim) if axis != 3)
        found.append(~jnp.isfinite(x.astype(jnp.float32)).all(axis=others))
    return jnp.stack(found).any(axis=0)
