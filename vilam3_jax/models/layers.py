"""Building blocks of all model families.

Modules take the keyword arguments of `StackInit`. With `stack=(num_layers,)` one module holds the parameters
of all layers, which `run_stack` and `scan_layers` scan over; it cannot be called directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NotRequired, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention import MaskInfo, attention
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.embedding_lookup import lookup
from vilam3_jax.sharding.logical_axes import shard
from vilam3_jax.sharding.matmul import GATHERED, linear

REMAT_TAGS = ("qkv", "mlp")


class Init(TypedDict):
    """Random streams of the parameters, types of activations and parameters."""

    rngs: nnx.Rngs
    dtype: Any
    param_dtype: Any


class StackInit(Init):
    """`Init` and the leading axes of the parameters."""

    stack: NotRequired[tuple[int, ...]]


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Glorot uniform over the last two axes; leading axes are layers."""
    init = jax.nn.initializers.xavier_uniform(batch_axis=tuple(range(len(shape) - 2)))
    return init(key, shape, dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`, with an optional low-rank addition (LoRA, arXiv:2106.09685).

    Features may span two axes, such as (heads, head dim); the parameters are those of the flattened layer:
    kernel [in, out]; bias [out] if `use_bias`; lora_a [in, r] and lora_b [r, out] if `lora_rank` > 0.
    """

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        *,
        kernel_init: Callable[..., jax.Array] = xavier_uniform,
        use_bias: bool = True,
        lora_rank: int = 0,
        lora_alpha: float = 1.0,
        **init: Unpack[StackInit],
    ):
        rngs, param_dtype, stack = init["rngs"], init["param_dtype"], init.get("stack", ())
        self.dtype = jnp.dtype(init["dtype"])
        self.in_features, self.out_features = _axes(in_features), _axes(out_features)
        in_dim, out_dim = math.prod(self.in_features), math.prod(self.out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (*stack, in_dim, out_dim), param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, out_dim), param_dtype)) if use_bias else None
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        if lora_rank:
            # B starts at zero, so a new adapter changes nothing.
            noise = jax.random.normal(rngs.lora(), (*stack, in_dim, lora_rank), param_dtype)
            self.lora_a = nnx.Param(noise * in_dim**-0.5)
            self.lora_b = nnx.Param(jnp.zeros((*stack, lora_rank, out_dim), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, ..., *in_features] -> [batch, ..., *out_features]."""
        x = x.astype(self.dtype)
        y = linear(x, self.kernel.get_value(), self.in_features, self.out_features)
        if self.lora_rank:
            low = linear(x, self.lora_a.get_value(), self.in_features, (self.lora_rank,))
            low = shard(low, *("batch", "length")[: low.ndim - 1], None)
            delta = linear(low, self.lora_b.get_value(), (self.lora_rank,), self.out_features)
            y = y + delta * jnp.asarray(self.lora_alpha / self.lora_rank, self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype).reshape(self.out_features)
        return y


def _axes(features: int | tuple[int, ...]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else features


class Embed(nnx.Module):
    """Embedding table: ids [batch, length] -> [batch, length, width] in `dtype`."""

    def __init__(self, num: int, width: int, *, stddev: float = 0.02, **init: Unpack[Init]):
        self.dtype = jnp.dtype(init["dtype"])
        noise = jax.random.normal(init["rngs"].params(), (num, width), init["param_dtype"])
        self.embedding = nnx.Param(noise * stddev)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return lookup(ids, self.embedding.get_value(), self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float, **init: Unpack[StackInit]):
        self.eps = float(eps)
        self.dtype = jnp.dtype(init["dtype"])
        self.scale = nnx.Param(jnp.ones((*init.get("stack", ()), width), init["param_dtype"]))

    def normalise(self, x: jax.Array) -> jax.Array:
        """x without its scale, float32."""
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)

    def __call__(self, x: jax.Array) -> jax.Array:
        return (self.normalise(x) * self.scale[...]).astype(self.dtype)


class LayerNorm(RMSNorm):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float, **init: Unpack[StackInit]):
        super().__init__(width, eps=eps, **init)
        self.bias = nnx.Param(jnp.zeros((*init.get("stack", ()), width), init["param_dtype"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = self.normalise(x - x.mean(axis=-1, keepdims=True))
        return (x * self.scale[...] + self.bias[...]).astype(self.dtype)


class SelfAttention(nnx.Module):
    """Bidirectional multi-head attention: x [B, L, D] -> [B, L, D].

    With `qk_norm_eps`, queries and keys are RMS-normalised over the full width, before heads are split.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm_eps: float | None = None,
        **init: Unpack[StackInit],
    ):
        if width % num_heads:
            raise UserError(
                f"hidden_size {width} is not a multiple of num_heads {num_heads}; change one of them"
            )
        self.heads = heads = (num_heads, width // num_heads)
        qk_features = heads if qk_norm_eps is None else width
        self.q = Linear(width, qk_features, use_bias=qkv_bias, **init)
        self.k = Linear(width, qk_features, use_bias=qkv_bias, **init)
        self.v = Linear(width, heads, use_bias=qkv_bias, **init)
        self.o = Linear(heads, width, **init)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(width, eps=qk_norm_eps, **init)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(width, eps=qk_norm_eps, **init)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, query: jax.Array | None = None
    ) -> jax.Array:
        """Attends from `query` [B, Q, D], by default `x`, to `x`: -> [B, Q, D]."""
        q, k, v = self.q(x if query is None else query), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            # QK-norm spans all heads, so sharded heads need an all-reduce.
            q = self.q_norm(shard(q, "batch", None, "heads")).reshape(*q.shape[:-1], *self.heads)
            k = self.k_norm(shard(k, "batch", None, "heads")).reshape(*k.shape[:-1], *self.heads)
        q, k, v = (checkpoint_name(shard(y, "batch", None, "heads", None), "qkv") for y in (q, k, v))
        return self.o(attention(q, k, v, MaskInfo(segment_ids, segment_ids)))


class GeluMLP(nnx.Module):
    """fc1 -> GELU, by default the one approximated with tanh -> fc2."""

    def __init__(self, width: int, mlp_dim: int, *, approximate: bool = True, **init: Unpack[StackInit]):
        self.approximate = approximate
        self.fc1 = Linear(width, mlp_dim, **init)
        self.fc2 = Linear(mlp_dim, width, **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = checkpoint_name(shard(self.fc1(x), "batch", None, "mlp"), "mlp")
        return self.fc2(jax.nn.gelu(hidden, approximate=self.approximate))


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block of SigLIP's two towers."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, eps: float, **init: Unpack[StackInit]):
        self.norm1 = LayerNorm(width, eps=eps, **init)
        self.attn = SelfAttention(width, num_heads, **init)
        self.norm2 = LayerNorm(width, eps=eps, **init)
        self.mlp = GeluMLP(width, mlp_dim, **init)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        x = shard(x + self.attn(self.norm1(x), segment_ids), "batch", None, "embed")
        return shard(x + self.mlp(self.norm2(x)), "batch", None, "embed")


def remat_layer(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wraps a layer so that the backward pass recomputes activations that are not saved.

    Args:
      body: function of one layer.
      remat: 'none' saves everything; 'full' saves only layer inputs; otherwise tags joined by '+', such as
        'qkv' or 'qkv+mlp': layer inputs and the tagged activations are saved.

    Raises:
      UserError: unknown policy.
    """
    policies, tags = jax.checkpoint_policies, remat.split("+")
    if remat == "none":
        if logical_axes.current() is None:
            return body
        # Except gathered weights: saved for every layer, they would be the whole model.
        policy = policies.save_anything_except_these_names(GATHERED)
    elif remat == "full":
        policy = None
    elif set(tags) <= set(REMAT_TAGS):
        policy = policies.save_only_these_names(*tags)
    else:
        raise UserError(
            f"model.remat={remat!r} is unknown; use 'none', 'full' or tags joined by '+' from {REMAT_TAGS}"
        )
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


def run_stack(
    blocks: nnx.Module, x: jax.Array, *args: Any, remat: str, count: int | None = None
) -> jax.Array:
    """Runs x through the first `count` layers (default: all) of a stacked module: `layer(x, *args)`."""
    graphdef, params = compat.split(blocks)
    if count is not None:
        params = jax.tree.map(lambda p: p[:count], params)

    def body(carry: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return compat.merge(graphdef, layer)(carry, *args), None

    return jax.lax.scan(remat_layer(body, remat), x, params)[0]


def scan_layers(
    body: Callable[[Any, Any, Any], Any], carry: Any, layers: Any, kinds: Sequence[Hashable]
) -> Any:
    """Scans stacked layers of several kinds, such as sliding-window and full attention.

    Kinds are static, so the scan runs over whole periods of their pattern; the remainder is unrolled.

    Args:
      body: (carry, layer, kind) → carry.
      carry: initial carry; the final one is returned.
      layers: pytree of arrays with a leading layer axis.
      kinds: kind of each layer.
    """
    count = len(kinds)
    period = next(p for p in range(1, count + 1) if all(kinds[i] == kinds[i % p] for i in range(count)))
    whole = count - count % period

    def of_period(carry: Any, layers: Any) -> tuple[Any, None]:
        for i in range(period):
            layer = layers if period == 1 else jax.tree.map(lambda x, i=i: x[i], layers)
            carry = body(carry, layer, kinds[i])
        return carry, None

    def periods(x: jax.Array) -> jax.Array:
        return x if period == 1 else x[:whole].reshape(whole // period, period, *x.shape[1:])

    carry, _ = jax.lax.scan(of_period, carry, jax.tree.map(periods, layers))
    for i in range(whole, count):
        carry = body(carry, jax.tree.map(lambda x, i=i: x[i], layers), kinds[i])
    return carry
