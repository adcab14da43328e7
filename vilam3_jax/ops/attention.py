"""Softmax attention behind one function, so that kernels can change without the models noticing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.ops import attention_splash, partition
from vilam3_jax.ops.attention_xla import MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK, Marks, attend_blocks

# Fewer queries (a pooling probe, short texts) have small scores, and padding to the kernel's blocks would
# cost more than the kernel saves.
MIN_SPLASH_QUERIES = 128


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids_q: jax.Array | None = None,
    segment_ids_kv: jax.Array | None = None,
    causal: bool = False,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Grouped-query attention with packing and causal masks; softmax in float32.

    A query attends to a key iff their segment ids are equal and not 0 and, when causal, the key's position
    is not beyond the query's. A query with no key at all (padding) gives zeros.

    In a sharded step (`partition.activation_rules`) every device attends for its own rows, heads and queries.
    Keys and values are repeated only where there are fewer key heads than parts that the heads are cut into.
    Which implementation runs is the step's choice (`config.attention`); calls with explicit positions, those
    of cached generation, are always XLA's.

    Args:
      q: [B, Lq, H, hd].
      k: [B, Lk, K, hd]; H is a multiple of K, and query head h reads key head h // (H // K).
      v: [B, Lk, K, hd].
      segment_ids_q: int [B, Lq], 0 for padding; None if every query is real.
      segment_ids_kv: int [B, Lk]; given exactly when `segment_ids_q` is.
      causal: whether to mask keys beyond the query.
      q_positions: int [B, Lq], the index that `causal` compares; by default the place in the row.
      kv_positions: int [B, Lk]; given exactly when `q_positions` is.
      scale: multiplies the scores; 1/sqrt(hd) by default.

    Returns:
      [B, Lq, H, hd] in the type of `q`.

    Raises:
      ValueError: heads do not divide (by key heads, or by the mesh), only one of a pair of arguments is
        given, or a causal call has Lq != Lk and no positions.
      UserError: the step's implementation does not run on its devices.
    """
    _, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key heads")
    if (segment_ids_q is None) != (segment_ids_kv is None):
        raise ValueError("give segment ids of both queries and keys, or of neither")
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("give positions of both queries and keys, or of neither")
    if causal and q_positions is None and q_len != kv_len:
        raise ValueError(f"causal attention of {q_len} queries over {kv_len} keys needs positions")
    # Rounded once, not twice: 1/sqrt(hd) is seldom a number of the queries' type.
    q = (q.astype(jnp.float32) * (head_dim**-0.5 if scale is None else scale)).astype(q.dtype)
    k, v = _match_heads(k, heads), _match_heads(v, heads)
    if q_positions is None and _implementation(q_len) == "splash":
        return _splash(q, k, v, segment_ids_q, segment_ids_kv, causal)
    return _xla(q, k, v, Marks(segment_ids_q, segment_ids_kv, q_positions, kv_positions), causal)


def _implementation(q_len: int) -> str:
    """'xla' or 'splash', by the step's choice and the devices that it is for."""
    choice, platform = partition.attention_choice(), partition.platform()
    if choice == "splash" and platform != "tpu" and not attention_splash.INTERPRET:
        raise UserError(
            f"config attention='splash' is a kernel for TPUs, and the devices are {platform}; "
            "set attention to 'auto' or 'xla'"
        )
    if choice == "auto":
        return "splash" if platform == "tpu" and q_len >= MIN_SPLASH_QUERIES else "xla"
    return choice


def _match_heads(x: jax.Array, heads: int) -> jax.Array:
    """Repeats key heads where there are fewer than parts that the query heads are cut into."""
    ways, kv_heads = partition.ways("heads"), x.shape[2]
    repeats = math.lcm(ways, kv_heads) // kv_heads
    if heads % (kv_heads * repeats):
        raise ValueError(
            f"{heads} query and {kv_heads} key heads do not split into {ways}; set activation_rules.heads "
            "and kv_heads to None, queries to the axis that had them"
        )
    return jnp.repeat(x, repeats, axis=2) if repeats > 1 else x


def _pad(x: jax.Array, axis: int, length: int, fill: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill)


def _blocks(x: Any, block: int, fill: int = 0) -> Any:
    """[B, Lq, ...] -> [B, blocks, block, ...], so that each device can have a part of every block."""
    if x is None:
        return None
    x = _pad(x, 1, x.shape[1] + -x.shape[1] % block, fill)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _on_devices(
    local: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    marks: Marks,
    kernel: Any = None,
) -> jax.Array:
    """Calls `local(q, k, v, marks)`; on a mesh every device with its own rows, heads and queries.

    Left to the partitioner, the reshapes inside cost some fifty small collectives a layer and direction.
    A splash `kernel` is the first argument, cut into the parts of the queries.
    """
    placed = partition.placement()
    if placed is None:
        return local(q, k, v, marks) if kernel is None else local(kernel, q, k, v, marks)
    mesh, spec = placed

    def rows(x: jax.Array | None, *axes: str | None) -> Any:
        # Positions may be the same for all rows: [1, ...].
        return None if x is None else spec("batch" if x.shape[0] == q.shape[0] else None, *axes)

    out = rows(q, None, "queries", "heads", None)
    keys = rows(k, None, "heads", None)
    marked = Marks(
        rows(marks.segment_ids_q, None, "queries"),
        rows(marks.segment_ids_kv, None),
        rows(marks.q_positions, None, "queries"),
        rows(marks.kv_positions, None),
    )
    specs: tuple[Any, ...] = (out, keys, keys, marked)
    if kernel is None:
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(q, k, v, marks)
    cut = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, *spec("queries"))))
    # The kernel's outputs do not say over which axes they vary.
    run = jax.shard_map(local, mesh=mesh, in_specs=(cut, *specs), out_specs=out, check_vma=False)
    return run(kernel, q, k, v, marks)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, causal: bool) -> jax.Array:
    batch, q_len, heads, head_dim = q.shape
    by_row_index = causal and marks.q_positions is None
    block = q_len
    if by_row_index:
        index = jnp.arange(q_len)[None]
        marks = marks._replace(q_positions=index, kv_positions=index)
        block = min(q_len, max(MIN_QUERY_BLOCK, -(-q_len // MAX_QUERY_BLOCKS)))
    if not causal:
        marks = marks._replace(q_positions=None, kv_positions=None)
    block += -block % partition.ways("queries")
    marks = marks._replace(
        segment_ids_q=_blocks(marks.segment_ids_q, block), q_positions=_blocks(marks.q_positions, block, -1)
    )
    local = partial(attend_blocks, keys_per_block=block if by_row_index else None)
    out = _on_devices(local, _blocks(q, block), k, v, marks)
    return out.reshape(batch, -1, heads, head_dim)[:, :q_len]


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, ids_q: Any, ids_kv: Any, causal: bool) -> jax.Array:
    batch, q_len, heads, head_dim = q.shape
    kv_len = k.shape[1]
    parts = partition.ways("queries")
    # Where devices share the queries, each has a part of every block: under a causal mask, equal work.
    block = attention_splash.padded(-(-q_len // (MAX_QUERY_BLOCKS * parts))) * parts if parts > 1 else 0
    block = block or attention_splash.padded(q_len)
    has_key = None
    if ids_q is None:
        ids_q, ids_kv = jnp.ones((1, q_len), jnp.int32), jnp.ones((1, kv_len), jnp.int32)
    else:
        has_key = _has_key(ids_q, ids_kv, causal)
    # Padding is a segment of its own, 0.
    q, ids_q = _blocks(q, block), _blocks(ids_q, block)
    padded = q.shape[1] * block if causal else attention_splash.padded(kv_len)
    k, v, ids_kv = (_pad(x, 1, padded) for x in (k, v, ids_kv))
    # [parts, blocks, block / parts]: the queries of each part, one after the other.
    indices = np.arange(q.shape[1] * block).reshape(-1, parts, block // parts).swapaxes(0, 1).reshape(-1)
    kernel = attention_splash.make_kernel(indices, padded, heads // partition.ways("heads"), causal, parts)

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks) -> jax.Array:
        flat = q.reshape(q.shape[0], -1, *q.shape[3:])
        ids = marks.segment_ids_q.reshape(marks.segment_ids_q.shape[0], -1)
        return attention_splash.attend(kernel, flat, k, v, ids, marks.segment_ids_kv).reshape(q.shape)

    out = _on_devices(local, q, k, v, Marks(ids_q, ids_kv, None, None), kernel)
    out = out.reshape(batch, -1, heads, head_dim)[:, :q_len]
    return out if has_key is None else jnp.where(has_key[:, :, None, None], out, 0)


def _has_key(ids_q: jax.Array, ids_kv: jax.Array, causal: bool) -> jax.Array:
    """Bool [B, Lq]: which queries see any key at all. Of a row with itself, all that are not padding."""
    real = ids_q != 0
    if ids_q is ids_kv:
        return real
    seen = ids_q[:, :, None] == ids_kv[:, None, :]
    if causal:
        index = jnp.arange(ids_q.shape[1])
        seen &= index[:, None] >= index
    return real & seen.any(axis=2)
