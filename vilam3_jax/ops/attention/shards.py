"""Sharding of an attention call: padding, blocks of queries, `shard_map`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.sharding import logical_axes


def match_heads(x: jax.Array, heads: int, shards: int) -> jax.Array:
    """Repeats key heads if there are fewer than the `shards` of the query heads."""
    kv_heads = x.shape[2]
    repeats = math.lcm(shards, kv_heads) // kv_heads
    if heads % (kv_heads * repeats):
        raise UserError(
            f"{heads} query and {kv_heads} key heads do not split into {shards}; set activation_rules.heads "
            "and kv_heads to '', queries to tensor (for a tower: tower_heads and tower_queries)"
        )
    return jnp.repeat(x, repeats, axis=2) if repeats > 1 else x


def pad(x: jax.Array, axis: int, length: int, fill: int = 0) -> jax.Array:
    """Pads an axis at its end to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill)


def to_blocks(x: Any, block: int, fill: int = 0) -> Any:
    """[B, Lq, ...] -> [B, blocks, block, ...], so that each device can take a part of every block."""
    if x is None:
        return None
    x = pad(x, 1, x.shape[1] + -x.shape[1] % block, fill)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def on_devices(
    local: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: MaskInfo,
    kernel: Any = None,
    *,
    sharded: bool,
    block: int | None = None,
    kernel_split: bool = False,
    check_vma: bool = True,
) -> jax.Array:
    """Calls `local(q, k, v, mask)`; on a mesh every device computes its own rows, heads and queries.

    Left to the partitioner, the reshapes inside cost some fifty small collectives per layer and direction.

    Args:
      local, q, k, v, mask, sharded: see `backends.Backend`.
      kernel: splash kernel, passed to `local` first; with `kernel_split` it is split along the queries.
      block: if given, `local` gets queries and their masks in blocks [B, blocks, block, ...], padded with
        segment id 0 and position -1; devices that share the queries take a part of every block.
      kernel_split: see `kernel`.
      check_vma: see `jax.shard_map`.
    """
    shape, blocks = q.shape, ()
    if block is not None:
        ids, positions = to_blocks(mask.segment_ids_q, block), to_blocks(mask.q_positions, block, -1)
        mask = dataclasses.replace(mask, segment_ids_q=ids, q_positions=positions)
        q, blocks = to_blocks(q, block), (None,)
    arguments = (*(() if kernel is None else (kernel,)), q, k, v, mask)
    step = logical_axes.current() if sharded else None
    run = local
    if step is not None:
        mesh, spec = step

        def rows(x: jax.Array | None, *axes: str | None) -> Any:
            # Arrays of a mask may have a batch of 1.
            return None if x is None else spec("batch" if x.shape[0] == shape[0] else None, *axes)

        out, keys = rows(q, *blocks, "queries", "heads", None), rows(k, None, "heads", None)
        mask_specs = dataclasses.replace(
            mask,
            segment_ids_q=rows(mask.segment_ids_q, *blocks, "queries"),
            segment_ids_kv=rows(mask.segment_ids_kv, None),
            q_positions=rows(mask.q_positions, *blocks, "queries"),
            kv_positions=rows(mask.kv_positions, None),
        )
        in_specs: tuple[Any, ...] = (out, keys, keys, mask_specs)
        if kernel is not None:
            queries = PartitionSpec(None, *spec("queries" if kernel_split else None))
            in_specs = (kernel.manual_sharding_spec(NamedSharding(mesh, queries)), *in_specs)
        run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=check_vma)
    result = run(*arguments)
    return result if block is None else result.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def zero_without_key(out: jax.Array, mask: MaskInfo) -> jax.Array:
    """Zeros where a query sees no key; in self-attention that is padding."""
    ids_q, ids_kv = mask.segment_ids_q, mask.segment_ids_kv
    if ids_q is None or ids_kv is None:
        return out
    seen = ids_q != 0
    if ids_q is not ids_kv:
        pairs = ids_q[:, :, None] == ids_kv[:, None, :]
        if mask.causal:
            index = jnp.arange(ids_q.shape[1])[None]
            pairs &= mask.allowed(index, index)
        seen &= pairs.any(axis=2)
    return jnp.where(seen[:, :, None, None], out, 0)
