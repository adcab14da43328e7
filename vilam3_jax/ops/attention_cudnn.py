"""Attention by cuDNN's fused kernel for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

JAX gives that kernel no segment ids, and its causal mode alone would let packed samples see each other. So it
always gets the whole mask, [B, 1, Lq, Lk]: 2 bytes a pair (as a bias), for all heads together. What the
causal mask also forbids it does not compute.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vilam3_jax.errors import UserError

# The kernel wants even lengths where it gets a mask.
MULTIPLE = 8
MAX_HEAD_DIM = 128


def refusal(q: Any) -> str:
    """Why the kernel cannot take queries [B, Lq, H, hd] of this shape and type; empty if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {q.dtype}; set model.dtype"
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM:
        return f"needs a head size up to {MAX_HEAD_DIM} that is a multiple of 8, not {q.shape[3]}"
    return ""


def mask(ids_q: jax.Array, ids_kv: jax.Array, causal: bool) -> jax.Array:
    """Who sees whom: int [B or 1, Lq] and [B or 1, Lk] -> bool [B or 1, 1, Lq, Lk].

    Unlike elsewhere padding, segment 0, sees padding: a query that sees nothing would give NaN.
    """
    allowed = ids_q[:, :, None] == ids_kv[:, None]
    if causal:
        allowed &= jnp.arange(ids_q.shape[1])[:, None] >= jnp.arange(ids_kv.shape[1])
    return allowed[:, None]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, ids_q: jax.Array, ids_kv: jax.Array, *, causal: bool
) -> jax.Array:
    """One device's share.

    Args:
      q: [B, Lq, H, hd], scaled, bfloat16 or float16; Lq is a multiple of `MULTIPLE`, as is Lk.
      k: [B, Lk, K, hd].
      v: [B, Lk, K, hd].
      ids_q: int [B or 1, Lq]. Padding attends to padding: its output means nothing.
      ids_kv: int [B or 1, Lk].
      causal: whether to mask keys beyond the query.

    Returns:
      As `q`.
    """
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask(ids_q, ids_kv, causal), scale=1.0, is_causal=causal, implementation="cudnn"
    )


def check_user_can_run(platform: str, q: Any) -> None:
    """Raises: UserError: devices, type or shape do not fit the kernel."""
    if platform != "gpu":
        raise UserError(
            f"config attention='cudnn' is a kernel for NVIDIA GPUs, and the devices are {platform}; "
            "set attention to 'auto' or 'xla'"
        )
    if refusal(q):
        raise UserError(f"config attention='cudnn' {refusal(q)}, or attention to 'auto' or 'xla'")
