"""Attention of one new token per row to the key-value cache, as a TPU kernel.

The kernel reads the layer's part of the stacked cache in place and skips blocks beyond the row's length. XLA
reads all slots, and takes several passes over the scores.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.matmul import LANES

KERNEL = "cached_attention"
_BLOCK = 512  # slots that are read together
_MASKED = -1e30


def supports(q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernel computes a call: on a TPU, one query per row, a whole number of heads per device.

    Args:
      q: [B, Q, H, hd].
      k: keys of all layers, [layers, B, K, size, hd].
    """
    shards = logical_axes.axis_size("heads")
    return (
        logical_axes.platform() == "tpu"
        and q.shape[1] == 1
        and q.dtype == k.dtype
        and q.shape[-1] % LANES == 0
        and k.shape[2] % shards == 0
        and logical_axes.axis_size("queries") == 1
        and math.gcd(k.shape[3], _BLOCK) >= LANES
    )


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, slots: jax.Array, window: int | None = None
) -> jax.Array:
    """Attends to the slots up to the row's own; softmax in float32.

    Args:
      q: scaled, [B, 1, H, hd]; query head h reads key head h // (H // K).
      k: [layers, B, K, size, hd], with the row's own key.
      v: [layers, B, K, size, hd].
      layer: int [], whose keys and values to read.
      slots: int [B], last slot that a row attends to.
      window: number of slots that it attends to, its own included; None for all.

    Returns:
      [B, 1, H, hd] in the type of `q`.
    """
    run = functools.partial(_attend, window=window)
    arguments = (q, k, v, layer.reshape(1), slots)
    if (step := logical_axes.current()) is None:
        return run(*arguments)
    mesh, spec = step
    heads, cache = spec("batch", None, "heads", None), spec(None, "batch", "heads", None, None)
    # The types of kernels say nothing about the mesh axes over which a result varies.
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(heads, cache, cache, PartitionSpec(), spec("batch")),
        out_specs=heads,
        check_vma=False,
    )(*arguments)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    slots: jax.Array,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """One device's part."""
    rows, _, heads, width = q.shape
    kv_heads, size = k.shape[2:4]
    group, block = heads // kv_heads, math.gcd(size, _BLOCK)
    queries = q.reshape(rows, kv_heads, group, width)
    of_row = pl.BlockSpec((None, kv_heads, group, width), lambda row, step, layer, slots: (row, 0, 0, 0))

    def place(row: Any, step: Any, layer: Any, slots: Any) -> tuple[Any, ...]:
        # Blocks without a slot are those of the previous or next step, which are not read again.
        first, last = _blocks(slots[row], size, block, window)
        return layer[0], row, 0, jnp.clip(step, first, last), 0

    of_cache = pl.BlockSpec((None, None, kv_heads, block, width), place)
    out = pl.pallas_call(
        functools.partial(_kernel, size=size, block=block, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, size // block),
            in_specs=[of_row, of_cache, of_cache],
            out_specs=of_row,
            scratch_shapes=[
                pltpu.VMEM((kv_heads, group, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, group, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, group, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=KERNEL,
    )(layer, slots, queries, k, v)
    return out.reshape(q.shape)


def _blocks(slot: Any, size: int, block: int, window: int | None) -> tuple[Any, Any]:
    """The first and the last block that a row attends to."""
    last = jnp.minimum(slot, size - 1) // block
    return (0 if window is None else jnp.maximum(slot - window + 1, 0) // block), last


def _kernel(
    layer: Any, slots: Any, q: Any, k: Any, v: Any, out: Any, peak: Any, total: Any, sums: Any,
    *, size: int, block: int, window: int | None,
) -> None:  # fmt: skip
    """One block of one row: q and out [K, G, hd], k and v [K, block, hd]; a running softmax in the others."""
    row, step = pl.program_id(0), pl.program_id(1)
    slot = slots[row]
    first, last = _blocks(slot, size, block, window)

    @pl.when(step == 0)
    def start() -> None:
        peak[...] = jnp.full_like(peak, _MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when((step >= first) & (step <= last))
    def visit() -> None:
        contracted = (((2,), (2,)), ((0,), (0,)))
        scores = jax.lax.dot_general(q[...], k[...], contracted, preferred_element_type=jnp.float32)
        seen = step * block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        allowed = seen <= slot
        if window is not None:
            allowed &= seen > slot - window
        scores = jnp.where(allowed, scores, _MASKED)
        before = peak[...][..., :1]
        highest = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
        weights, fade = jnp.exp(scores - highest), jnp.exp(before - highest)
        summed = (((2,), (1,)), ((0,), (0,)))
        values = jax.lax.dot_general(
            weights.astype(v.dtype), v[...], summed, preferred_element_type=jnp.float32
        )
        sums[...] = sums[...] * fade + values
        total[...] = total[...] * fade + weights.sum(axis=-1, keepdims=True)
        peak[...] = jnp.broadcast_to(highest, peak.shape)

    @pl.when(step == size // block - 1)
    def finish() -> None:
        out[...] = (sums[...] / total[...][..., :1]).astype(out.dtype)
