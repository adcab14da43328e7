"""The training losses: next-token cross entropy that never holds all logits, SigLIP's pairwise sigmoid."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from vilam3_jax.ops.partition import shard
from vilam3_jax.ops.products import einsum


def chunked_cross_entropy(
    hidden: jax.Array,
    head_kernel: jax.Array,
    tokens: jax.Array,
    loss_weights: jax.Array,
    segment_ids: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted next-token cross entropy over packed rows.

    The state at t-1 predicts token t iff both lie in the same segment and that is not 0; the term counts with
    `loss_weights[t]`. Positions without a loss cost nothing: each row's supervised positions are moved to
    its front, and only as many chunks are computed as the fullest row needs. At most `[B, chunk, V]`
    logits exist at a time. The gradient is taken in the same pass as the value (logits are not computed
    again) and is exact; `loss_weights` are constants.

    Args:
      hidden: [B, L, D], states after the last norm.
      head_kernel: [D, V]; it is used in the type of `hidden`, the logits are float32.
      tokens: int [B, L].
      loss_weights: float [B, L], weight of token t as a target.
      segment_ids: int [B, L], 0 for padding.
      chunk: positions of every row whose logits are held at a time.

    Returns:
      (sum of weighted losses, sum of weights, sum of weights where the most probable token is the target),
      float32 scalars.

    Raises:
      ValueError: `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, not {chunk}")
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    weights = jnp.where(same, loss_weights[:, 1:].astype(jnp.float32), 0.0)
    # The last position predicts nothing; it keeps a zero weight so that the length stays L.
    weights = jax.lax.stop_gradient(jnp.pad(weights, ((0, 0), (0, 1))))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    sums: Any = _cross_entropy(hidden, head_kernel, targets, weights, chunk)
    return sums[0], weights.sum(), sums[1]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head_kernel, targets, weights, chunk):
    loss_sum, correct_sum, _, _ = _scan_chunks(hidden, head_kernel, targets, weights, chunk, False, False)
    return loss_sum, correct_sum


def _cross_entropy_forward(hidden, head_kernel, targets, weights, chunk):
    loss_sum, correct_sum, d_hidden, d_kernel = _scan_chunks(
        hidden.value,
        head_kernel.value,
        targets.value,
        weights.value,
        chunk,
        hidden.perturbed,
        head_kernel.perturbed,  # a frozen head costs no product for its gradient
    )
    return (loss_sum, correct_sum), (d_hidden, d_kernel)


def _cross_entropy_backward(chunk, gradients, cotangents):
    d_loss, _ = cotangents  # the count of right answers is piecewise constant
    if isinstance(d_loss, SymbolicZero):
        return None, None, None, None
    d_hidden, d_kernel = (None if g is None else (g * d_loss).astype(g.dtype) for g in gradients)
    return d_hidden, d_kernel, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


def _scan_chunks(hidden, head_kernel, targets, weights, chunk, hidden_gradient, kernel_gradient):
    """Returns the sums of losses and of right answers, and the gradients by hidden and kernel (or None)."""
    length = hidden.shape[1]
    chunk = min(chunk, length)
    padded = -(-length // chunk) * chunk
    supervised = weights != 0
    order = jnp.argsort(~supervised, axis=1, stable=True)  # [B, L]: supervised positions first

    def compact(x):
        x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
        return jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))

    states, targets, weights = compact(hidden), compact(targets), compact(weights)
    kernel = head_kernel.astype(hidden.dtype)
    used_chunks = (supervised.sum(axis=1).max() + chunk - 1) // chunk

    def take(x, i):
        return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)

    def body(i, carry):
        loss_sum, correct_sum, d_states, d_kernel = carry
        x, target, weight = take(states, i), take(targets, i), take(weights, i)
        logits = einsum("bld,dv->blv", x, kernel, preferred_element_type=jnp.float32)
        logits = shard(logits, "batch", None, "vocab")
        peak = logits.max(axis=-1, keepdims=True)
        exponentials = jnp.exp(logits - peak)
        total = exponentials.sum(axis=-1, keepdims=True)
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target[..., None]
        target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
        loss = jnp.log(total[..., 0]) + peak[..., 0] - target_logit
        loss_sum += (loss * weight).sum()
        correct_sum += jnp.where(target_logit >= peak[..., 0], weight, 0.0).sum()
        if hidden_gradient or kernel_gradient:
            d_logits = (exponentials / total - is_target) * weight[..., None]
            d_logits = shard(d_logits.astype(hidden.dtype), "batch", None, "vocab")
        if hidden_gradient:
            d_x = einsum("blv,dv->bld", d_logits, kernel, preferred_element_type=jnp.float32)
            d_states = jax.lax.dynamic_update_slice_in_dim(
                d_states, d_x.astype(d_states.dtype), i * chunk, axis=1
            )
        if kernel_gradient:
            d_kernel += einsum("bld,blv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return loss_sum, correct_sum, d_states, d_kernel

    zero = jnp.zeros((), jnp.float32)
    d_states = jnp.zeros_like(states) if hidden_gradient else None
    d_kernel = jnp.zeros(head_kernel.shape, jnp.float32) if kernel_gradient else None
    carry = (zero, zero, d_states, d_kernel)
    loss_sum, correct_sum, d_states, d_kernel = jax.lax.fori_loop(0, used_chunks, body, carry)
    d_hidden = None
    if hidden_gradient:
        back = jnp.argsort(order, axis=1)[..., None]  # the inverse permutation
        d_hidden = jnp.take_along_axis(d_states[:, :length], back, axis=1)
    if kernel_gradient:
        d_kernel = d_kernel.astype(head_kernel.dtype)
    return loss_sum, correct_sum, d_hidden, d_kernel


def sigmoid_contrastive_loss(
    img: jax.Array,
    txt: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
    valid: jax.Array | None = None,
    positive: jax.Array | None = None,
) -> jax.Array:
    """SigLIP's loss (arXiv:2303.15343): every image-text pair of the batch is its own yes/no question.

    Args:
      img: [B, E], unit length.
      txt: [B, E], unit length; row i belongs to image i.
      logit_scale: scalar, the logarithm of the inverse temperature.
      logit_bias: scalar.
      valid: bool [B]; a row that is False takes part in no pair. None: all are real.
      positive: bool [B, B], image i and text j belong together. None: where i = j, as in the paper.

    Returns:
      float32 scalar: -log sigmoid summed over all pairs of valid rows, divided by the number of valid rows
      (0 if there is none).
    """
    valid = jnp.ones(img.shape[0], bool) if valid is None else valid
    scale = jnp.exp(jnp.asarray(logit_scale, jnp.float32))
    logits = jnp.einsum("ie,je->ij", img, txt, preferred_element_type=jnp.float32) * scale + logit_bias
    logits = shard(logits, "batch", None)
    positive = jnp.eye(img.shape[0], dtype=bool) if positive is None else positive
    sign = jnp.where(positive, 1.0, -1.0)
    pairs = valid[:, None] & valid[None, :]
    total = -jnp.where(pairs, jax.nn.log_sigmoid(sign * logits), 0.0).sum()
    return total / jnp.maximum(valid.sum(), 1)
