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
from vilam3_jax.ops.attention.shards import on_devices, pad, zero_without_key
from vilam3_jax.ops.attention.xla import MAX_QUERY_BLOCKS
from vilam3_jax.sharding import logical_axes

LANES = 128  # the kernel's blocks of keys are multiples of this
# Tests on CPUs set this: the kernel is then interpreted, slowly.
INTERPRET = False

# A block of queries reads every block of keys once: 1,024 multiply-adds per byte, more than any TPU needs
# to be bound by its matrix units (v6e needs most: 560). The scores of a block of queries and COMPUTE_BLOCK
# keys in float32 stay within the 16 MiB of scoped VMEM of v5e and v5p.
BLOCK = 1024
COMPUTE_BLOCK = 512
# The fused backward kernel computes the scores once instead of twice (5 products for 7), but writes the
# queries' gradient once per block of keys. With two blocks, their sum costs twice what the kernel saves
# (Llama-3-8B, 4,096 tokens, v5p: 6.8e7 against 3.4e7 cycles), so one block must hold all keys.
MAX_FUSED = 2048


def padded(length: int) -> int:
    """The padded length that the kernel needs: a multiple of 128, or of 512 for rows over 1,024."""
    return length + -length % (LANES if length <= BLOCK else COMPUTE_BLOCK)


def make_kernel(q_indices: np.ndarray, kv_len: int, heads: int, mask: MaskInfo, shards: int) -> Any:
    """The kernel for one row: (scaled q [H, Lq / shards, hd], k, v [K, Lk, hd], `SegmentIds`) → as q.

    Args:
      q_indices: int [Lq], index in the row of each query, in any order.
      kv_len: number of keys. Both lengths are `padded`; each shard of the queries is a multiple of 128.
      heads: query heads of one device.
      mask: provides `causal` and `window`.
      shards: devices that share the queries.
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
    backward: dict[str, Any] = dict(block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=compute)
    return splash.BlockSizes(**forward, **backward, block_q_dq=queries, block_kv_dq=keys)


def _block(length: int, limit: int) -> int:
    """The largest multiple of 128 up to `limit` that divides `length`."""
    return next(size for size in range(min(length, limit), 0, -LANES) if length % size == 0)


class Splash:
    """JAX's splash attention kernel."""

    name = "splash"

    def supports(self, call: AttentionCall) -> Support:
        """On TPUs, and by default only if there are enough queries."""
        if call.platform != "tpu" and not (INTERPRET and not call.automatic):
            return Support(False, f"is a kernel for TPUs, and the devices are {call.platform}")
        if call.automatic and (queries := call.q.shape[1]) < MIN_KERNEL_QUERIES:
            return Support(False, f"pads {queries} queries, fewer than {MIN_KERNEL_QUERIES}, to a block")
        return Support(True)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, sharded: bool) -> jax.Array:
        """See `backends.Backend`."""
        q_len, heads = q.shape[1:3]
        shards = logical_axes.axis_size("queries") if sharded else 1
        head_shards = logical_axes.axis_size("heads") if sharded else 1
        # Devices that share the queries take a part of every block: equal work under a causal mask.
        block = padded(-(-q_len // (MAX_QUERY_BLOCKS * shards))) * shards if shards > 1 else padded(q_len)
        rows_len = q_len + -q_len % block
        full = mask.with_segment_ids(q_len, k.shape[1])
        kv_len = rows_len if mask.causal else padded(k.shape[1])
        # Padding has segment id 0.
        k, v, ids_kv = (pad(x, 1, kv_len) for x in (k, v, full.segment_ids_kv))
        # The queries of one shard after another. A full mask is the same for all shards and is not split.
        indices = np.arange(rows_len).reshape(-1, shards, block // shards).swapaxes(0, 1).reshape(-1)
        indices, splits = (indices, shards) if mask.causal else (indices[: len(indices) // shards], 1)
        kernel = make_kernel(indices, kv_len, heads // head_shards, mask, splits)

        def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo) -> jax.Array:
            batch = q.shape[0]
            flat = q.reshape(batch, -1, *q.shape[3:])
            ids_q = mask.segment_ids_q.reshape(mask.segment_ids_q.shape[0], -1)
            # Padding attends to padding; its output is set to 0 below.
            ids = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in (ids_q, mask.segment_ids_kv))
            segment_ids = splash.SegmentIds(*(x.astype(jnp.int32) for x in ids))
            heads_first = (x.transpose(0, 2, 1, 3) for x in (flat, k, v))
            return jax.vmap(kernel)(*heads_first, segment_ids).transpose(0, 2, 1, 3).reshape(q.shape)

        options: dict[str, Any] = dict(block=block, kernel_split=mask.causal, check_vma=False)
        packed = MaskInfo(full.segment_ids_q, ids_kv)
        return zero_without_key(on_devices(local, q, k, v, packed, kernel, sharded=sharded, **options), mask)


SPLASH = Splash()
