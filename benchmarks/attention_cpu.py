"""Times our attention and `jax.nn.dot_product_attention` on packed causal rows of SmolLM2-135M's shape.

`whole` is our algorithm for short rows (a quarter of the queries at a time, over all earlier keys) at every
length; `ours` switches to blockwise attention for long rows. MiB are XLA's temporary arrays, forward and
backward.

python benchmarks/attention_cpu.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vilam3_jax.ops.attention import MaskInfo, attention, xla

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def ours(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return attention(q, k, v, MaskInfo(segment_ids, segment_ids, causal=True))


def whole(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    limit, xla.MAX_SHORT = xla.MAX_SHORT, q.shape[1]
    try:
        return ours(q, k, v, segment_ids)
    finally:
        xla.MAX_SHORT = limit


def plain(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)


def milliseconds(function: Callable[..., Any], *args: jax.Array, repeats: int = 3) -> float:
    """Best of `repeats` runs after one that compiles."""
    jax.block_until_ready(function(*args))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def squared(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    return jnp.square(function(*args)).sum()


def main() -> None:
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; milliseconds, float32")
    for batch, length in ((8, 512), (2, 1024), (1, 2048), (1, 4096)):
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (batch, length, HEADS, HEAD_DIM))
        k, v = (jax.random.normal(key, (batch, length, KV_HEADS, HEAD_DIM)) for key in keys[1:])
        segment_ids = jnp.repeat(jnp.arange(1, 5), length // 4)[None].repeat(batch, axis=0)
        for name, function in (("jax.nn", plain), ("whole", whole), ("ours", ours)):
            forward = milliseconds(jax.jit(function), q, k, v, segment_ids)
            gradient = jax.jit(jax.grad(partial(squared, function), (0, 1, 2)))
            compiled = gradient.lower(q, k, v, segment_ids).compile()
            both = milliseconds(compiled, q, k, v, segment_ids)
            mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
            print(
                f"[{batch} x {length}] {name:7s} forward {forward:7.1f}   forward+backward {both:7.1f}   "
                f"{mib:6.0f} MiB"
            )


if __name__ == "__main__":
    main()
