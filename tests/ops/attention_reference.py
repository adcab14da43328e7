"""NumPy references of attention and random inputs, shared by the tests of its backends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vilam3_jax.ops.attention import MaskInfo, attention


def dense(q, k, v, mask, scale=None):
    """Float64 attention, one query head at a time; queries without a key give zeros."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, _, heads, width = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            scores = q[b, :, h] @ k[b, :, g].T * (width**-0.5 if scale is None else scale)
            weights = np.where(mask[b], np.exp(scores - scores.max()), 0.0)
            total = weights.sum(axis=1, keepdims=True)
            out[b, :, h] = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ v[b, :, g]
    return out


def dense_with_gradients(q, k, v, mask, d_out):
    """Output and gradients by q, k and v in float64, one head at a time; queries without a key give zeros."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        own, key = (b, slice(None), h), (b, slice(None), h // group)
        scores = q[own] @ k[key].T * scale
        weights = np.exp(scores - scores.max(axis=1, keepdims=True)) * mask[b]
        total = weights.sum(axis=1, keepdims=True)
        weights /= np.where(total == 0, 1, total)
        d_weights = d_out[own] @ v[key].T
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True)) * scale
        out[own] = weights @ v[key]
        d_q[own] = d_scores @ k[key]
        d_k[key] += d_scores.T @ q[own]
        d_v[key] += weights.T @ d_out[own]
    return out, d_q, d_k, d_v


def dense_mask(ids, causal, window=None):
    """Bool [B, L, L] of packed self-attention, True where a query sees a key."""
    mask = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None]
    if causal:
        distance = np.arange(ids.shape[1])[:, None] - np.arange(ids.shape[1])
        mask &= (distance >= 0) & (distance < (ids.shape[1] if window is None else window))
    return mask


def inputs(batch=2, q_len=9, kv_len=None, heads=6, kv_heads=2, width=8, seed=0):
    kv_len = q_len if kv_len is None else kv_len
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (batch, q_len, heads, width)),
        jax.random.normal(keys[1], (batch, kv_len, kv_heads, width)),
        jax.random.normal(keys[2], (batch, kv_len, kv_heads, width)),
    )


def packed(length, seed=0):
    """Two rows of random segments; the second ends in padding."""
    rng = np.random.default_rng(seed)
    ids = 1 + np.sort(rng.integers(0, 4, (2, length)), axis=1)
    ids[1, -max(1, length // 5) :] = 0
    return ids


def random_segments(rng, rows, length):
    """Samples of random sizes, numbered in order; some rows end in padding, some are all padding."""
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        end = length if rng.random() < 0.5 else int(rng.integers(0, length))
        cuts = np.sort(rng.integers(0, max(end, 1), int(rng.integers(0, 4))))
        row[:end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
    return ids


def self_attention(ids=None, **mask):
    """`attention` of packed rows as a function of q, k and v."""
    ids = None if ids is None else jnp.asarray(ids)
    return lambda q, k, v: attention(q, k, v, MaskInfo(ids, ids, **mask))


def with_gradients(function, weight):
    """(q, k, v) -> the output, and the gradients of its product with `weight`."""

    def total(*values):
        out = function(*values)
        return (out * weight).sum(), out

    both = jax.value_and_grad(total, (0, 1, 2), has_aux=True)

    def flat(*values):
        (_, out), gradients = both(*values)
        return out, *gradients

    return flat


def assert_close(got, want, **tolerance):
    """Compares output and gradients."""
    for name, value, expected in zip(("out", "q", "k", "v"), got, want, strict=True):
        np.testing.assert_allclose(np.asarray(value, np.float32), expected, err_msg=name, **tolerance)
