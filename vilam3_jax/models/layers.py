"""Building blocks of all towers.

Every module takes `stack`: leading axes of its parameters. `stack=(num_layers,)` makes one module hold the
parameters of all layers, which `run_stack` then scans over; calling a stacked module directly is meaningless.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vilam3_jax.errors import UserError
from vilam3_jax.ops import quantized
from vilam3_jax.ops.attention import attention
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.embedding_lookup import lookup
from vilam3_jax.sharding.logical_axes import shard
from vilam3_jax.sharding.matmul import GATHERED, einsum, linear

Stack = tuple[int, ...]
Init = Callable[..., jax.Array]

REMAT_TAGS = ("qkv", "mlp")
_WEIGHTS = ("kernel", "lora_a", "lora_b", "embedding")


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Glorot uniform over the last two axes; leading axes are layers."""
    init = jax.nn.initializers.xavier_uniform(batch_axis=tuple(range(len(shape) - 2)))
    return init(key, shape, dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`, with an optional low-rank addition (LoRA, arXiv:2106.09685).

    Parameters: kernel [in, out]; bias [out] if `use_bias`; lora_a [in, r] and lora_b [r, out] if
    `lora_rank` > 0.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        kernel_init: Init = xavier_uniform,
        use_bias: bool = True,
        stack: Stack = (),
        lora_rank: int = 0,
        lora_alpha: float = 1.0,
        lead: tuple[str | None, ...] = ("batch", None),
    ):
        self.dtype = jnp.dtype(dtype)
        self.lead = lead  # logical axes of an input [batch, ..., in]
        self.stored: tuple[tuple[str, Any], ...] = ()  # (parameter, mesh axes), see `find_weights`
        self.products: quantized.QuantizedMatmul | None = None  # of the kernel, see `quantize_products`
        self.kernel = nnx.Param(kernel_init(rngs.params(), (*stack, in_dim, out_dim), param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, out_dim), param_dtype)) if use_bias else None
        self.lora_scale = lora_alpha / lora_rank if lora_rank else None
        if lora_rank:
            # B starts at zero: a fresh adapter changes nothing.
            noise = jax.random.normal(rngs.lora(), (*stack, in_dim, lora_rank), param_dtype)
            self.lora_a = nnx.Param(noise * in_dim**-0.5)
            self.lora_b = nnx.Param(jnp.zeros((*stack, lora_rank, out_dim), param_dtype))

    def __call__(self, x: jax.Array, *, head_dim: int | None = None, from_heads: bool = False) -> jax.Array:
        """[batch, ..., in] -> [batch, ..., out].

        `from_heads` takes [batch, ..., heads, hd], `head_dim` gives [batch, ..., out / head_dim, head_dim].
        """
        x = x.astype(self.dtype)
        lead = self.lead[: x.ndim - 1 - from_heads]

        def times(x: jax.Array, name: str, head_dim: int | None, product: Any = einsum) -> jax.Array:
            return linear(x, getattr(self, name)[...], dict(self.stored).get(name), lead, head_dim, product)

        y = times(x, "kernel", head_dim, self._kernel_product())
        if self.lora_scale is not None:
            low = shard(times(x, "lora_a", None), *lead, None)
            y = y + times(low, "lora_b", head_dim) * jnp.asarray(self.lora_scale, self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype).reshape(y.shape[len(lead) :])
        return y

    def _kernel_product(self) -> Any:
        if isinstance(self.kernel.get_value(), quantized.QuantizedKernel):
            return quantized.frozen_einsum
        return einsum if self.products is None else partial(quantized.einsum, self.products)


class Embed(nnx.Module):
    """Table look-up: ids [batch, length] -> [batch, length, width] in `dtype`."""

    def __init__(
        self,
        num: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        stddev: float = 0.02,
        lead: tuple[str | None, ...] = ("batch", None),
    ):
        self.lead = lead  # logical axes of the ids
        self.dtype = jnp.dtype(dtype)
        self.stored: tuple[tuple[str, Any], ...] = ()  # as of `Linear`
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (num, width), param_dtype) * stddev)

    def __call__(self, ids: jax.Array) -> jax.Array:
        stored = dict(self.stored).get("embedding")
        return lookup(ids, self.embedding[...], self.dtype, stored, self.lead)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float, dtype: Any, param_dtype: Any, stack: Stack = ()):
        self.eps = float(eps)
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((*stack, width), param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, width), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...] + self.bias[...]).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float, dtype: Any, param_dtype: Any, stack: Stack = ()):
        self.eps = float(eps)
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((*stack, width), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...]).astype(self.dtype)


class SelfAttention(nnx.Module):
    """Bidirectional multi-head attention: x [B, L, D] -> [B, L, D].

    A pooling head gives a `query` [B, Q, D] of its own and gets [B, Q, D]. With `qk_norm_eps`, queries and
    keys are RMS-normalised over the full width, before heads are split.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        stack: Stack = (),
        qkv_bias: bool = True,
        qk_norm_eps: float | None = None,
    ):
        if width % num_heads:
            raise UserError(
                f"hidden_size {width} is no multiple of num_heads {num_heads}; change one of them"
            )
        self.num_heads, self.head_dim = num_heads, width // num_heads
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, stack=stack)
        self.q = Linear(width, width, rngs=rngs, use_bias=qkv_bias, **kwargs)
        self.k = Linear(width, width, rngs=rngs, use_bias=qkv_bias, **kwargs)
        self.v = Linear(width, width, rngs=rngs, use_bias=qkv_bias, **kwargs)
        self.o = Linear(width, width, rngs=rngs, **kwargs)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(width, eps=qk_norm_eps, **kwargs)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(width, eps=qk_norm_eps, **kwargs)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, query: jax.Array | None = None
    ) -> jax.Array:
        source = x if query is None else query

        def kept(y: jax.Array) -> jax.Array:
            return checkpoint_name(shard(y, "batch", None, "heads", None), "qkv")

        def heads(layer: Linear, norm: RMSNorm | None, x: jax.Array) -> jax.Array:
            if norm is None:
                return layer(x, head_dim=self.head_dim)
            # The mean of squares runs over all heads: with heads over devices it is a sum across them.
            y = norm(shard(layer(x), "batch", None, "heads"))
            return y.reshape(*y.shape[:-1], self.num_heads, self.head_dim)

        q, k = kept(heads(self.q, self.q_norm, source)), kept(heads(self.k, self.k_norm, x))
        v = kept(heads(self.v, None, x))
        out = attention(q, k, v, segment_ids_q=segment_ids, segment_ids_kv=segment_ids, causal=False)
        return self.o(out, from_heads=True)


class GeluMLP(nnx.Module):
    """fc1 -> GELU, by default the one approximated with tanh -> fc2."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        stack: Stack = (),
        approximate: bool = True,
    ):
        self.approximate = approximate
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype, stack=stack)
        self.fc1 = Linear(width, mlp_dim, **kwargs)
        self.fc2 = Linear(mlp_dim, width, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = checkpoint_name(shard(self.fc1(x), "batch", None, "mlp"), "mlp")
        return self.fc2(jax.nn.gelu(hidden, approximate=self.approximate))


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block of SigLIP's two towers."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        eps: float,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        stack: Stack = (),
    ):
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, stack=stack)
        self.norm1 = LayerNorm(width, eps=eps, **kwargs)
        self.attn = SelfAttention(width, num_heads, rngs=rngs, **kwargs)
        self.norm2 = LayerNorm(width, eps=eps, **kwargs)
        self.mlp = GeluMLP(width, mlp_dim, rngs=rngs, **kwargs)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        x = shard(x + self.attn(self.norm1(x), segment_ids), "batch", None, "embed")
        return shard(x + self.mlp(self.norm2(x)), "batch", None, "embed")


def remat_layer(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wraps the body of a layer scan so that the backward pass recomputes what is not worth keeping.

    Args:
      body: scan body of one layer.
      remat: 'none' keeps everything; 'full' keeps only layer inputs; else tags joined by '+', such as
        'qkv' or 'qkv+mlp': layer inputs and the tagged activations are kept.

    Raises:
      UserError: unknown policy.
    """
    if remat == "none":
        # But weights gathered from other devices: kept for every layer, they would be the whole model.
        policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        return (
            body
            if logical_axes.placement() is None
            else jax.checkpoint(body, prevent_cse=False, policy=policy)
        )
    if remat == "full":
        return jax.checkpoint(body, prevent_cse=False)
    tags = remat.split("+")
    if not set(tags) <= set(REMAT_TAGS):
        raise UserError(
            f"model.remat={remat!r} is unknown; use 'none', 'full' or tags joined by '+' from {REMAT_TAGS}"
        )
    policy = jax.checkpoint_policies.save_only_these_names(*tags)
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


def find_weights(model: nnx.Module) -> None:
    """Tells every `Linear` and `Embed` of a model where the step stores its weights.

    See `logical_axes.activation_rules`.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Embed):
            found = {name: logical_axes.stored("/".join((*map(str, path), name))) for name in _WEIGHTS}
            layers = len((module.kernel if isinstance(module, Linear) else module.embedding).shape) - 2

            def of_layer(spec: Any, layers: int = layers) -> tuple[Any, ...]:
                return (*spec, None, None, None)[layers : layers + 2]

            module.stored = tuple(
                (name, tuple(map(of_layer, spec)) if isinstance(spec, list) else of_layer(spec))
                for name, spec in found.items()
                if spec is not None
            )


def quantize_products(model: nnx.Module, how: quantized.QuantizedMatmul, modules: str) -> None:
    """Quantises products of kernels in a model, but for those of its head; LoRA's stay as they are.

    Args:
      model: built or merged; changed in place.
      how: types of the factors.
      modules: regular expression of `Linear` modules, such as 'llm/layers/.*'.

    Raises:
      UserError: it matches none.
    """
    for module in matching(model, modules).values():
        module.products = how


def matching(model: nnx.Module, modules: str) -> dict[str, Linear]:
    """Path → the `Linear` modules that a regular expression names; never the LLM's head.

    Raises:
      UserError: it matches none.
    """
    found = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, Linear)}
    possible = {path: module for path, module in sorted(found.items()) if path != "llm/lm_head"}
    named = {path: module for path, module in possible.items() if re.fullmatch(modules, path)}
    if not named:
        raise UserError(f"config quantization.modules={modules!r} matches none of {', '.join(possible)}")
    return named


def run_stack(
    blocks: nnx.Module, x: jax.Array, *args: Any, remat: str, count: int | None = None
) -> jax.Array:
    """Runs x through the first `count` layers (default: all) of a stacked module; each gets `args` too."""
    graphdef, params = compat.split(blocks)
    if count is not None:
        params = jax.tree.map(lambda p: p[:count], params)

    def body(carry: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return compat.merge(graphdef, layer)(carry, *args), None

    return jax.lax.scan(remat_layer(body, remat), x, params)[0]
