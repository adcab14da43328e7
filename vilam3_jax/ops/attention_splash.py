"""Attention by JAX's splash kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention).

Scores stay on the chip: memory is linear in the length, and blocks above the diagonal are not computed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

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


def make_kernel(q_indices: np.ndarray, kv_len: int, heads: int, causal: bool, parts: int) -> Any:
    """The kernel for one row.

    Args:
      q_indices: int [Lq], the place in the row of each query, which need not be in order.
      kv_len: number of keys. Both lengths are `padded`, each part of the queries is a multiple of 128.
      heads: query heads of one device.
      causal: whether to mask keys beyond the query.
      parts: how many devices share the queries.

    Returns:
      A pytree that is called with q [H, Lq / parts, hd], scaled, k and v [K, Lk, hd] and `SegmentIds`.
    """
    q_len = len(q_indices)
    if causal:
        mask = splash.CausalMask((q_len, kv_len))
        mask.q_sequence = q_indices.astype(np.int32)
    else:
        mask = splash.FullMask((q_len, kv_len))
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=parts,
        block_sizes=_block_sizes(q_len // parts, kv_len),
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
