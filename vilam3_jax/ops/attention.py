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
from vilam3_jax.ops import attention_blockwise, attention_cudnn, attention_splash
from vilam3_jax.ops.attention_xla import MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK, Marks, attend_blocks
from vilam3_jax.sharding import logical_axes

# Fewer queries (a pooling probe, short texts) have small scores, and padding to the kernel's blocks would
# cost more than the kernel saves.
MIN_KERNEL_QUERIES = 128
# Of a tower's tokens, see `row_length`: 729 of SigLIP become 768, 1,025 of InternViT would become 1,536.
MAX_ROW_PADDING = 1 / 16
# Longer rows go blockwise: their scores would be the largest thing a step holds.
MAX_SHORT = 1024


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
    length: str | None = None,
) -> jax.Array:
    """Grouped-query attention with packing and causal masks; softmax in float32.

    A query attends to a key iff their segment ids are equal and not 0 and, when causal, the key's position
    is not beyond the query's. A query with no key at all (padding) gives zeros.

    In a sharded step (`logical_axes.activation_rules`) every device computes its own rows, heads and queries.
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
      length: the logical axis along which a step may split Lq = Lk over devices; None if it never does.

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
    marks = Marks(segment_ids_q, segment_ids_kv, q_positions, kv_positions)
    if length is not None and logical_axes.ways(length) > 1:
        return _over_devices_of_a_row(q, k, v, marks, causal, length)
    parts = logical_axes.ways("heads")
    k, v = _match_heads(k, heads, parts), _match_heads(v, heads, parts)
    return _by_implementation(q, k, v, marks, causal, spread=True)


def row_length(tokens: int) -> int:
    """The length that a tower should give its rows of `tokens`, the rest as padding.

    A kernel pads rows to whole blocks, in every layer and back; one padding of the tower's input is cheaper,
    if it adds little to the other products.
    """
    choice = logical_axes.attention_choice()
    kernel = choice == "splash" or (choice in ("auto", "ring") and logical_axes.platform() == "tpu")
    if not kernel or tokens < MIN_KERNEL_QUERIES:
        return tokens
    padded = attention_splash.padded(tokens)
    return padded if padded - tokens <= MAX_ROW_PADDING * tokens else tokens


def _by_implementation(
    q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, causal: bool, spread: bool
) -> jax.Array:
    """Attention of whole rows.

    Args:
      q: [B, Lq, H, hd], scaled.
      k: [B, Lk, K, hd].
      v: [B, Lk, K, hd].
      marks: segment ids and positions as `attention` got them.
      causal: see `attention`.
      spread: whether to spread the work over the step's mesh; False inside `shard_map`.
    """
    implementation = "xla" if marks.q_positions is not None else _implementation(q)
    return {"xla": _xla, "splash": _splash, "cudnn": _cudnn}[implementation](q, k, v, marks, causal, spread)


def _implementation(q: jax.Array) -> str:
    """'xla', 'splash' or 'cudnn', by the step's choice and the devices that it is for."""
    choice, platform = logical_axes.attention_choice(), logical_axes.platform()
    if choice == "splash" and platform != "tpu" and not attention_splash.INTERPRET:
        raise UserError(
            f"config attention='splash' is a kernel for TPUs, and the devices are {platform}; "
            "set attention to 'auto' or 'xla'"
        )
    if choice == "cudnn":
        attention_cudnn.check_user_can_run(platform, q)
    if choice not in ("auto", "ring"):
        return choice
    if platform == "tpu" and q.shape[1] >= MIN_KERNEL_QUERIES:
        return "splash"
    whole = q.shape[1] >= MIN_KERNEL_QUERIES and logical_axes.ways("queries") == 1
    return "cudnn" if platform == "gpu" and whole and not attention_cudnn.refusal(q) else "xla"


def _match_heads(x: jax.Array, heads: int, parts: int) -> jax.Array:
    """Repeats key heads where there are fewer than `parts` that the query heads are cut into."""
    kv_heads = x.shape[2]
    repeats = math.lcm(parts, kv_heads) // kv_heads
    if heads % (kv_heads * repeats):
        raise UserError(
            f"{heads} query and {kv_heads} key heads do not split into {parts}; set activation_rules.heads "
            "and kv_heads to '', queries to tensor (of a tower: tower_heads and tower_queries)"
        )
    return jnp.repeat(x, repeats, axis=2) if repeats > 1 else x


def _over_devices_of_a_row(
    q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, causal: bool, length: str
) -> jax.Array:
    """Attention of rows of which each device along the axes of `length` holds a part.

    Where heads divide, devices exchange lengths for heads before and after (arXiv:2309.14509); else, or if
    the step asks for it, keys travel around a ring.
    """
    placed, size = logical_axes.placement(), logical_axes.ways(length)
    assert placed is not None
    mesh, spec = placed
    choice = logical_axes.attention_choice()
    q_len, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if marks.q_positions is not None or k.shape[1] != q_len:
        raise ValueError("a row over several devices attends to itself, by its own indices")
    if q_len % size or logical_axes.ways("queries") > 1:
        raise UserError(
            f"rows of {q_len} do not split into {size} along activation_rules.{length}, or queries are split "
            "too: set data.seq_len to a multiple, activation_rules.queries to ''"
        )
    parts = logical_axes.ways("heads") * size
    exchange = choice != "ring" and heads % math.lcm(parts, kv_heads) == 0
    if not exchange and choice in ("splash", "cudnn"):
        raise UserError(
            f"config attention={choice!r}: {heads} query and {kv_heads} key heads do not split into {parts}, "
            f"mesh.tensor times mesh.context; change the mesh, or set attention to 'ring'"
        )
    if not exchange:
        parts = logical_axes.ways("heads")
    k, v = _match_heads(k, heads, parts), _match_heads(v, heads, parts)
    ids = marks.segment_ids_q, marks.segment_ids_kv
    if marks.segment_ids_q is None:
        ids = (jnp.ones((1, q_len), jnp.int32),) * 2
    axis = spec(length)[0]

    with_itself = ids[0] is ids[1]

    def exchanging(
        q: jax.Array, k: jax.Array, v: jax.Array, ids_q: jax.Array, ids_kv: jax.Array
    ) -> jax.Array:
        q, k, v = (jax.lax.all_to_all(x, axis, 2, 1, tiled=True) for x in (q, k, v))
        ids_q = jax.lax.all_gather(ids_q, axis, axis=1, tiled=True)
        ids_kv = ids_q if with_itself else jax.lax.all_gather(ids_kv, axis, axis=1, tiled=True)
        out = _by_implementation(q, k, v, Marks(ids_q, ids_kv, None, None), causal, spread=False)
        return jax.lax.all_to_all(out, axis, 1, 2, tiled=True)

    def around(q: jax.Array, k: jax.Array, v: jax.Array, ids_q: jax.Array, ids_kv: jax.Array) -> jax.Array:
        return _ring(q, k, v, ids_q, ids_kv, attention_blockwise.Ring(axis, size), causal)

    rows = spec("batch", length, "heads", None)
    id_specs = [spec("batch" if x.shape[0] == q.shape[0] else None, length) for x in ids]
    return jax.shard_map(
        exchanging if exchange else around,
        mesh=mesh,
        in_specs=(rows, rows, rows, *id_specs),
        out_specs=rows,
        # The kernels' outputs do not say over which axes they vary.
        check_vma=not exchange,
    )(q, k, v, *ids)


def _ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids_q: jax.Array,
    ids_kv: jax.Array,
    ring: attention_blockwise.Ring,
    causal: bool,
) -> jax.Array:
    part = q.shape[1]
    index = (jax.lax.axis_index(ring.axis) * part + jnp.arange(part, dtype=jnp.int32))[None]
    balanced = causal and part % 2 == 0
    if balanced:
        q, k, v, ids_q, ids_kv, index = (
            attention_blockwise.balance(x, ring) for x in (q, k, v, ids_q, ids_kv, index)
        )
    block = min(attention_blockwise.BLOCK, -(-part // 2))
    marks = Marks(_blocks(ids_q, block), ids_kv, _blocks(index, block), index)
    out = attention_blockwise.attend(_blocks(q, block), k, v, marks, causal=causal, ring=ring)
    out = out.reshape(q.shape[0], -1, *q.shape[2:])[:, :part]
    return attention_blockwise.restore(out, ring) if balanced else out


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
    *,
    spread: bool,
    cut: bool = False,
    check_vma: bool = True,
) -> jax.Array:
    """Calls `local(q, k, v, marks)`; on a mesh every device with its own rows, heads and queries.

    Left to the partitioner, the reshapes inside cost some fifty small collectives a layer and direction.
    A splash `kernel` is the first argument, `cut` into the parts of the queries or the same for all of them.
    """
    placed = logical_axes.placement() if spread else None
    first = () if kernel is None else (kernel,)
    if placed is None:
        return local(*first, q, k, v, marks)
    mesh, spec = placed

    def rows(x: jax.Array | None, *axes: str | None) -> Any:
        # Marks may be the same for all rows: [1, ...].
        return None if x is None else spec("batch" if x.shape[0] == q.shape[0] else None, *axes)

    out = rows(q, None, "queries", "heads", None)
    keys = rows(k, None, "heads", None)
    marked = Marks(
        rows(marks.segment_ids_q, None, "queries"),
        rows(marks.segment_ids_kv, None),
        rows(marks.q_positions, None, "queries"),
        rows(marks.kv_positions, None),
    )
    in_specs: tuple[Any, ...] = (out, keys, keys, marked)
    if kernel is not None:
        over_queries = NamedSharding(mesh, PartitionSpec(None, *spec("queries" if cut else None)))
        in_specs = (kernel.manual_sharding_spec(over_queries), *in_specs)
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=check_vma)
    return run(*first, q, k, v, marks)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, causal: bool, spread: bool) -> jax.Array:
    batch, q_len, heads, head_dim = q.shape
    by_row_index = causal and marks.q_positions is None
    if by_row_index:
        index = jnp.arange(q_len, dtype=jnp.int32)[None]
        marks = marks._replace(q_positions=index, kv_positions=index)
    if not causal:
        marks = marks._replace(q_positions=None, kv_positions=None)
    if q_len > MAX_SHORT:
        block = attention_blockwise.BLOCK
        marks = _all_given(marks, q_len, k.shape[1])
        local = partial(attention_blockwise.attend, causal=causal)
    else:
        block = min(q_len, max(MIN_QUERY_BLOCK, -(-q_len // MAX_QUERY_BLOCKS))) if by_row_index else q_len
    block += -block % (logical_axes.ways("queries") if spread else 1)
    if q_len <= MAX_SHORT:
        local = partial(attend_blocks, keys_per_block=block if by_row_index else None)
    marks = marks._replace(
        segment_ids_q=_blocks(marks.segment_ids_q, block), q_positions=_blocks(marks.q_positions, block, -1)
    )
    out = _on_devices(local, _blocks(q, block), k, v, marks, spread=spread)
    return out.reshape(batch, -1, heads, head_dim)[:, :q_len]


def _all_given(marks: Marks, q_len: int, kv_len: int) -> Marks:
    """Marks that say the same without None."""
    if marks.segment_ids_q is None:
        marks = marks._replace(
            segment_ids_q=jnp.ones((1, q_len), jnp.int32), segment_ids_kv=jnp.ones((1, kv_len), jnp.int32)
        )
    if marks.q_positions is None:
        marks = marks._replace(
            q_positions=jnp.zeros((1, q_len), jnp.int32), kv_positions=jnp.zeros((1, kv_len), jnp.int32)
        )
    return marks


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, causal: bool, spread: bool) -> jax.Array:
    batch, q_len, heads, head_dim = q.shape
    parts, head_parts = (logical_axes.ways("queries"), logical_axes.ways("heads")) if spread else (1, 1)
    # Where devices share the queries, each has a part of every block: under a causal mask, equal work.
    if parts > 1:
        block = attention_splash.padded(-(-q_len // (MAX_QUERY_BLOCKS * parts))) * parts
    else:
        block = attention_splash.padded(q_len)
    ids_q, ids_kv, *_ = _all_given(marks, q_len, k.shape[1])
    # Padding is a segment of its own, 0.
    rows, blocks_of_ids = _blocks(q, block), _blocks(ids_q, block)
    kv_len = rows.shape[1] * block if causal else attention_splash.padded(k.shape[1])
    k, v, padded_ids = (_pad(x, 1, kv_len) for x in (k, v, ids_kv))
    # The queries of each part, one after the other. A full mask is the same for all parts, and JAX cuts none.
    indices = np.arange(rows.shape[1] * block).reshape(-1, parts, block // parts).swapaxes(0, 1).reshape(-1)
    indices, cuts = (indices, parts) if causal else (indices[: len(indices) // parts], 1)
    kernel = attention_splash.make_kernel(indices, kv_len, heads // head_parts, causal, cuts)

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks) -> jax.Array:
        flat = q.reshape(q.shape[0], -1, *q.shape[3:])
        ids = marks.segment_ids_q.reshape(marks.segment_ids_q.shape[0], -1)
        return attention_splash.attend(kernel, flat, k, v, ids, marks.segment_ids_kv).reshape(q.shape)

    padded_marks = Marks(blocks_of_ids, padded_ids, None, None)
    out = _on_devices(local, rows, k, v, padded_marks, kernel, spread=spread, cut=causal, check_vma=False)
    out = out.reshape(batch, -1, heads, head_dim)[:, :q_len]
    return _zero_without_key(out, marks, causal)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks, causal: bool, spread: bool) -> jax.Array:
    batch, q_len, heads, head_dim = q.shape
    if spread and logical_axes.ways("queries") > 1:
        raise UserError(
            "config attention: cuDNN's kernel takes whole rows; set activation_rules.queries to '', or "
            "attention to 'xla'"
        )
    ids_q, ids_kv, *_ = _all_given(marks, q_len, k.shape[1])
    kv_len = k.shape[1] + -k.shape[1] % attention_cudnn.MULTIPLE
    k, v, ids_kv = (_pad(x, 1, kv_len) for x in (k, v, ids_kv))
    block = q_len + -q_len % attention_cudnn.MULTIPLE

    def local(q: jax.Array, k: jax.Array, v: jax.Array, marks: Marks) -> jax.Array:
        ids = marks.segment_ids_q[:, 0], marks.segment_ids_kv
        return attention_cudnn.attend(q[:, 0], k, v, *ids, causal=causal)[:, None]

    padded_marks = Marks(_blocks(ids_q, block), ids_kv, None, None)
    out = _on_devices(local, _blocks(q, block), k, v, padded_marks, spread=spread, check_vma=False)
    return _zero_without_key(out.reshape(batch, -1, heads, head_dim)[:, :q_len], marks, causal)


def _zero_without_key(out: jax.Array, marks: Marks, causal: bool) -> jax.Array:
    """Zeros where a query sees no key; of a row with itself that is its padding."""
    ids_q, ids_kv = marks.segment_ids_q, marks.segment_ids_kv
    if ids_q is None:
        return out
    seen = ids_q != 0
    if ids_q is not ids_kv:
        pairs = ids_q[:, :, None] == ids_kv[:, None, :]
        if causal:
            index = jnp.arange(ids_q.shape[1])
            pairs &= index[:, None] >= index
        seen &= pairs.any(axis=2)
    return jnp.where(seen[:, :, None, None], out, 0)
