"""The cache of keys and values: plain arrays, or int8 with one scale for every position and head.

A cache is a dict of arrays. `k` and `v` are [layers, batch, size, kv heads, head dim]. An int8 cache has
`k_scale` and `v_scale` beside them, float32 [layers, batch, kv heads, size]: the order of axes in which
attention reads them, which also wastes no lanes on a TPU.
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
    shape = (layers, batch, size, kv_heads, head_dim)
    cache = {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
    if dtype == jnp.int8:
        scales = (layers, batch, kv_heads, size)
        cache |= {f"{name}_scale": jnp.zeros(scales, jnp.float32) for name in ("k", "v")}
    return cache


def partition_specs(dtype: Any, batch: Any, heads: Any) -> dict[str, PartitionSpec]:
    """The PartitionSpec of each array, from the mesh axes of rows and heads."""
    specs = {name: PartitionSpec(None, batch, None, heads) for name in ("k", "v")}
    if dtype == jnp.int8:
        specs |= {f"{name}_scale": PartitionSpec(None, batch, heads) for name in ("k", "v")}
    return specs


def lengthen(cache: Cache, size: int) -> Cache:
    """Pads a cache to `size` positions."""

    def pad(name: str, x: jax.Array) -> jax.Array:
        axis = _position_axis(name)
        return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    return {name: pad(name, x) for name, x in cache.items()}


def write(cache: Cache, layer: jax.Array, slots: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
    """Writes keys and values of one layer, [B, Q, K, hd] each, to slots [B, Q]; those beyond are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    written = dict(cache)
    # 'drop': padding may lie beyond the cache, and clamping would overwrite real slots.
    for name, x in (("k", k), ("v", v)):
        if cache[name].dtype == jnp.int8:
            x, scale = quantized.quantize_vectors(x)
            scales = cache[f"{name}_scale"]
            written[f"{name}_scale"] = scales.at[layer, rows, :, slots].set(scale, mode="drop")
        written[name] = cache[name].at[layer, rows, slots].set(x.astype(cache[name].dtype), mode="drop")
    return written


def read(cache: Cache, layer: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer, [B, size, K, hd] each, in `dtype`."""

    def of_layer(name: str) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False)

    def values(name: str) -> jax.Array:
        x = of_layer(name)
        if x.dtype != jnp.int8:
            return x.astype(dtype)
        scale = of_layer(f"{name}_scale").mT[..., None]
        return (x.astype(jnp.float32) * scale).astype(dtype)

    return values("k"), values("v")


def not_finite(cache: Cache) -> jax.Array:
    """Bool [layers, batch, size]: which positions have a key or value that is NaN or infinite.

    The scale of an int8 vector with such a number is not finite, either.
    """
    found = []
    for name, x in cache.items():
        others = tuple(axis for axis in range(2, x.ndim) if axis != _position_axis(name))
        found.append(~jnp.isfinite(x.astype(jnp.float32)).all(axis=others))
    return jnp.stack(found).any(axis=0)


def _position_axis(name: str) -> int:
    return 3 if name.endswith("_scale") else 2
