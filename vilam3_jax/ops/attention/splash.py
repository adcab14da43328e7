"""Attention by JAX's splash kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention).

Scores stay on the chip: memory is linear in the length, and blocks that the mask excludes are skipped.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from vilam3_jax.ops.attention.backends import MIN_KERNEL_QUERIES, AttentionCall, Support
from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.ops.attention.shards import on_devices, pad, to_blocks, zero_without_key
from vilam3_jax.ops.attention.xla import MAX_QUERY_BLOCKS
from vilam3_jax.sharding import logical_axes

LANES = 128  # the kernel's blocks of keys are multiples of this
# Tests on CPUs set this: the kernel is then interpreted, slowly.
INTERPRET = False

# A block of queries reads every block of keys once: 1,024 multiply-adds a byte fetched, above what any TPU
# needs to be bound by its matrix units (v6e, the most demanding: 560). Scores in flight, a block of queries
# by COMPUTE_BLOCK keys in float32, stay within the 16 MiB of scoped VMEM of v5e and v5p.
BLOCK = 1024
COMPUTE_BLOCK = 512
# The fused backward kernel computes the scores once instead of twice (5 products for 7), but writes the
# queries' gradient once per block of keys. With two blocks, adding those up costs twice what the kernel saves
# (Llama-3-8B, 4,096 tokens, v5p: 6.8e7 against 3.4e7 cycles), so one block must hold all keys.
MAX_FUSED = 2048


def padded(length: int) -> int:
    """The length with the padding that the kernel needs: multiples of 128, of 512 for rows over 1,024."""
    return length + -length % (LANES if length <= BLOCK else COMPUTE_BLOCK)


def make_kernel(q_indices: np.ndarray, kv_len: int, heads: int, mask: MaskInfo, shards: int) -> Any:
    """The kernel for one row.

    Args:
      q_indices: int [Lq], index in the row of each query, in any order.
      kv_len: number of keys. Both lengths are `padded`; each shard of the queries is a multiple of 128.
      heads: query heads of one device.
      mask: `causal` and `window` are read.
      shards: devices that share the queries.

    Returns:
      A pytree that is called with q [H, Lq / shards, hd], scaled, k and v [K, Lk, hd] and `SegmentIds`.
    """
    q_len = len(q_indices)
    if not mask.causal:
        head_mask: Any = splash.FullMask((q_len, kv_len))
    else:
        if mask.window is None:
            head_mask = splash.CausalMask((q_len, kv_len))
        else:
            head_mask = splash.LocalMask((q_len, kv_len), window_size=(mask.window - 1, 0), offset=0)
        head_mask.q_sequence = q_indices.astype(np.int32)
    return splash.make_splash_mha(
        splash.MultiHeadMask([head_mask] * heads),
        head_shards=1,
        q_seq_shards=shards,
        block_sizes=_block_sizes(q_len // shards, kv_len),
        interpret=INTERPRET,
    )


def _block_sizes(q_len: int, kv_len: int) -> Any:
    queries, keys = _block(q_len, BLOCK), _block(kv_len, BLOCK)
    compute = _block(keys, COMPUTE_BLOCK)
    forward: dict[str, Any] = dict(block_q=queries, block_kv=keys, block_kv_compute=compute)
    if kv_len <= MAX_FUSED:
        return splash.BlockSizes(
            **forward,
            block_q_dkv=queries,
            block_kv_dkv=kv_len,
            block_kv_dkv_compute=_block(kv_len, COMPUTE_BLOCK),
            use_fused_bwd_kernel=True,
        )
    return splash.BlockSizes(
        **forward,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=compute,
        block_q_dq=queries,
        block_kv_dq=keys,
    )


def _block(length: int, limit: int) -> int:
    """The largest multiple of 128 that divides `length` and is not beyond `limit`."""
    return next(size for size in range(min(length, limit), 0, -LANES) if length % size == 0)


class Splash:
    """JAX's splash attention kernel."""

    name = "splash"

    def supports(self, call: AttentionCall) -> Support:
        """On TPUs, and by default only if there are enough queries."""
        if call.platform != "tpu" and not (INTERPRET and not call.automatic):
            return Support(False, f"is a kernel for TPUs, and the devices are {call.platform}")
        if call.automatic and call.q.shape[1] < MIN_KERNEL_QUERIES:
            return Support(
                False, f"pads {call.q.shape[1]} queries, fewer than {MIN_KERNEL_QUERIES}, to a block"
            )
        return Support(True)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, sharded: bool) -> jax.Array:
        """See `backends.Backend`."""
        batch, q_len, heads, head_dim = q.shape
        shards, head_shards = (
            (logical_axes.axis_size("queries"), logical_axes.axis_size("heads")) if sharded else (1, 1)
        )
        # If devices share the queries, each has a part of every block: equal work under a causal mask.
        block = padded(-(-q_len // (MAX_QUERY_BLOCKS * shards))) * shards if shards > 1 else padded(q_len)
        full = mask.with_segment_ids(q_len, k.shape[1])
        # Padding is a segment of its own, 0.
        rows = to_blocks(q, block)
        kv_len = rows.shape[1] * block if mask.causal else padded(k.shape[1])
        k, v, ids_kv = (pad(x, 1, kv_len) for x in (k, v, full.segment_ids_kv))
        # The queries of one shard after another. A full mask is the same for all shards and is not split.
        indices = np.arange(rows.shape[1] * block).reshape(-1, shards, block // shards)
        indices = indices.swapaxes(0, 1).reshape(-1)
        indices, splits = (indices, shards) if mask.causal else (indices[: len(indices) // shards], 1)
        kernel = make_kernel(indices, kv_len, heads // head_shards, mask, splits)

        def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
            flat = q.reshape(q.shape[0], -1, *q.shape[3:])
            ids = mask.segment_ids_q.reshape(mask.segment_ids_q.shape[0], -1)
            return attend(kernel, flat, k, v, ids, mask.segment_ids_kv).reshape(q.shape)

        blocked = MaskInfo(to_blocks(full.segment_ids_q, block), ids_kv)
        out = on_devices(
            local, rows, k, v, blocked, kernel, sharded=sharded, kernel_split=mask.causal, check_vma=False
        )
        out = out.reshape(batch, -1, heads, head_dim)[:, :q_len]
        return zero_without_key(out, mask)


SPLASH = Splash()


def attend(
    kernel: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids_q: jax.Array,
    segment_ids_kv: jax.Array,
) -> jax.Array:
    """One device's share.

    Args:
      kernel: from `make_kernel`, cut into the parts of the queries.
      q: [B, Lq, H, hd], scaled.
      k: [B, Lk, K, hd].
      v: [B, Lk, K, hd].
      segment_ids_q: int [B or 1, Lq]. Padding attends to padding: its output means nothing.
      segment_ids_kv: int [B or 1, Lk].

    Returns:
      [B, Lq, H, hd] in the type of `q`.
    """
    rows = q.shape[0]
    ids = splash.SegmentIds(
        *(jnp.broadcast_to(x, (rows, x.shape[1])).astype(jnp.int32) for x in (segment_ids_q, segment_ids_kv))
    )
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.vmap(kernel)(*heads_first, ids).transpose(0, 2, 1, 3)
