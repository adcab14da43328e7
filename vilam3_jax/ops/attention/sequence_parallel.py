"""Attention of rows that are split over devices: by exchanging lengths for heads, or around a ring."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention import backends, blockwise
from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.ops.attention.shards import match_heads, on_devices
from vilam3_jax.sharding import logical_axes

AXIS = "length"


def attend_over_shards(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo) -> jax.Array:
    """Attention of rows that are split over the devices along the axes of `length`.

    If heads are divisible, devices exchange lengths for heads before and after (arXiv:2309.14509). Otherwise,
    or with `config.attention='ring'`, keys travel around a ring.

    Raises:
      ValueError: the call has explicit positions or is not self-attention.
      UserError: lengths or heads are not divisible.
    """
    step, size = logical_axes.current(), logical_axes.axis_size(AXIS)
    assert step is not None
    mesh, spec = step
    choice = backends.choice()
    q_len, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if mask.q_positions is not None or k.shape[1] != q_len:
        raise ValueError("rows over several devices support only self-attention without explicit positions")
    if q_len % size or logical_axes.axis_size("queries") > 1:
        raise UserError(
            f"rows of {q_len} do not split into {size} along activation_rules.{AXIS}, or queries are split "
            "too: set data.seq_len to a multiple, activation_rules.queries to ''"
        )
    shards = logical_axes.axis_size("heads") * size
    exchange = choice != backends.RING and heads % math.lcm(shards, kv_heads) == 0
    if not exchange and choice not in (backends.AUTO, backends.RING, "xla"):
        raise UserError(
            f"config attention={choice!r}: {heads} query and {kv_heads} key heads do not split into "
            f"{shards}, mesh.tensor times mesh.context; change the mesh, or set attention to 'ring'"
        )
    if not exchange:
        shards = logical_axes.axis_size("heads")
    k, v = match_heads(k, heads, shards), match_heads(v, heads, shards)
    same_ids = mask.segment_ids_q is mask.segment_ids_kv
    mask = mask.with_segment_ids(q_len, q_len)
    ids = (mask.segment_ids_q, mask.segment_ids_kv)
    assert ids[0] is not None and ids[1] is not None
    axis = spec(AXIS)[0]

    def exchanging(
        q: jax.Array, k: jax.Array, v: jax.Array, ids_q: jax.Array, ids_kv: jax.Array
    ) -> jax.Array:
        q, k, v = (jax.lax.all_to_all(x, axis, 2, 1, tiled=True) for x in (q, k, v))
        ids_q = jax.lax.all_gather(ids_q, axis, axis=1, tiled=True)
        ids_kv = ids_q if same_ids else jax.lax.all_gather(ids_kv, axis, axis=1, tiled=True)
        whole = dataclasses.replace(mask, segment_ids_q=ids_q, segment_ids_kv=ids_kv)
        backend = backends.select(backends.call_of(q, k.shape[1], whole, sharded=False))
        out = backend(q, k, v, whole, sharded=False)
        return jax.lax.all_to_all(out, axis, 1, 2, tiled=True)

    def around(q: jax.Array, k: jax.Array, v: jax.Array, ids_q: jax.Array, ids_kv: jax.Array) -> jax.Array:
        part = dataclasses.replace(mask, segment_ids_q=ids_q, segment_ids_kv=ids_kv)
        return _ring(q, k, v, part, blockwise.Ring(axis, size))

    rows = spec("batch", AXIS, "heads", None)
    id_specs = [spec("batch" if x.shape[0] == q.shape[0] else None, AXIS) for x in ids]
    return jax.shard_map(
        exchanging if exchange else around,
        mesh=mesh,
        in_specs=(rows, rows, rows, *id_specs),
        out_specs=rows,
        # Kernels do not state over which axes their outputs vary.
        check_vma=not exchange,
    )(q, k, v, *ids)


def _ring(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, ring: blockwise.Ring) -> jax.Array:
    part = q.shape[1]
    index = (jax.lax.axis_index(ring.axis) * part + jnp.arange(part, dtype=jnp.int32))[None]
    ids_q, ids_kv = mask.segment_ids_q, mask.segment_ids_kv
    balanced = mask.causal and part % 2 == 0
    if balanced:
        q, k, v, ids_q, ids_kv, index = (blockwise.balance(x, ring) for x in (q, k, v, ids_q, ids_kv, index))
    block = min(blockwise.BLOCK, -(-part // 2))
    mask = MaskInfo(ids_q, ids_kv, index, index, mask.causal, mask.window)
    local = partial(blockwise.attend, ring=ring)
    out = on_devices(local, q, k, v, mask, sharded=False, block=block)
    return blockwise.restore(out, ring) if balanced else out
