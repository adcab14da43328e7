"""The language models of VILA-1.5, VILA-M3 and NVILA: Llama, and by config Qwen2 and Qwen3.

Layouts are those of Hugging Face's LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.
`config.model.llm` may have, beside the sizes:
  qkv_bias, o_bias: biases in the attention projections (Qwen2: the first).
  qk_norm: RMS norm of each query and key head before it is rotated (Qwen3).
  rope_scaling: how rotary frequencies are stretched, see `rope_frequencies`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.models.layers import Embed, Linear, RMSNorm, run_stack
from vilam3_jax.ops.attention import attention
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_INIT = jax.nn.initializers.normal(0.02)

Cache = dict[str, jax.Array]


def rope_frequencies(head_dim: int, theta: float, scaling: Any = None) -> np.ndarray:
    """Angles per position of the pairs of a head (arXiv:2104.09864).

    Args:
      head_dim: even width of a head.
      theta: base of the frequencies.
      scaling: None, or a mapping with `type`. 'linear' divides all by `factor`. 'llama3' (Llama 3.1) divides
        those by `factor` whose wave is longer than `original_max_positions / low_freq_factor`, keeps those
        whose wave is shorter than `original_max_positions / high_freq_factor`, and goes over in between.

    Returns:
      float32 [head_dim / 2].

    Raises:
      UserError: unknown type.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    if not scaling:
        return frequencies
    if scaling["type"] == "linear":
        return frequencies / np.float32(scaling["factor"])
    if scaling["type"] != "llama3":
        raise UserError(
            f"model.llm.rope_scaling.type={scaling['type']!r} is unknown; use 'linear' or 'llama3'"
        )
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_positions"] * frequencies / (2 * np.pi)  # over the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / scaling["factor"] + kept * frequencies).astype(np.float32)


def rope_tables(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for rotary positions.

    Args:
      positions: int [B, L].
      frequencies: float32 [head_dim / 2], from `rope_frequencies`.

    Returns:
      Two float32 arrays [B, L, 1, head_dim / 2].
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [B, L, heads, hd] in float32; channel i pairs with channel i + hd/2 (rotate-half layout)."""
    if x.dtype == jnp.bfloat16:
        return _rotate(x, jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    # A TPU moves half a head across lanes slowly, but multiplies it by a permutation at no cost to speak of;
    # with bfloat16 factors that is exact.
    half = x.shape[-1] // 2
    turn = np.kron([[0, 1], [-1, 0]], np.eye(half))  # (first, second) -> (-second, first)
    turned = jnp.einsum("blhd,de->blhe", x, jnp.asarray(turn, x.dtype), preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def _rotate_forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, Any]:
    return _rotate(x, cos, sin), (cos, sin)


def _rotate_backward(kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    cos, sin = kept
    return _rotate(gradient, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


class LlamaAttention(nnx.Module):
    """Grouped-query self-attention: projections only; the layer decides what is attended to."""

    def __init__(self, cfg: Any, linear: Any, norm: dict[str, Any]):
        self.head_dim = cfg.head_dim
        q_dim, kv_dim = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        qkv_bias = cfg.get("qkv_bias", False)
        self.q = linear("q", cfg.hidden_size, q_dim, qkv_bias)
        self.k = linear("k", cfg.hidden_size, kv_dim, qkv_bias)
        self.v = linear("v", cfg.hidden_size, kv_dim, qkv_bias)
        self.o = linear("o", q_dim, cfg.hidden_size, cfg.get("o_bias", False))
        with_norm = cfg.get("qk_norm", False)
        self.q_norm = RMSNorm(cfg.head_dim, **norm) if with_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, **norm) if with_norm else None

    def project(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, L, D] -> q [B, L, H, hd], k and v [B, L, K, hd], rotated."""

        def heads(projection: Linear, axis: str) -> jax.Array:
            return shard(projection(x, head_dim=self.head_dim), "batch", "length", axis, None)

        q, k = heads(self.q, "heads"), heads(self.k, "kv_heads")
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        v = heads(self.v, "kv_heads")
        return checkpoint_name(q, "qkv"), checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv")

    def output(self, x: jax.Array) -> jax.Array:
        return self.o(shard(x, "batch", "length", "heads", None), from_heads=True)


class LlamaMLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, cfg: Any, linear: Any):
        self.gate = linear("gate", cfg.hidden_size, cfg.mlp_dim)
        self.up = linear("up", cfg.hidden_size, cfg.mlp_dim)
        self.down = linear("down", cfg.mlp_dim, cfg.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(shard(self.gate(x), "batch", "length", "mlp"), "mlp")
        up = checkpoint_name(shard(self.up(x), "batch", "length", "mlp"), "mlp")
        return self.down(jax.nn.silu(gate) * up)


class LlamaLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(
        self, cfg: Any, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, stack: tuple[int, ...] = ()
    ):
        rank = cfg.get("lora_rank", 0)
        targets = cfg.get("lora_targets", LORA_TARGETS)
        if rank < 0 or (rank and not targets):
            raise UserError(
                f"model.llm.lora_rank={rank} with lora_targets={tuple(targets)}: a rank of 0 (no LoRA) or "
                f"more, and for more also targets, of {LORA_TARGETS}"
            )
        unknown = sorted(set(targets) - set(LORA_TARGETS))
        if unknown:
            raise UserError(f"model.llm.lora_targets has unknown {unknown}; choose from {LORA_TARGETS}")

        def linear(name: str, in_dim: int, out_dim: int, use_bias: bool = False) -> Linear:
            return Linear(
                in_dim,
                out_dim,
                rngs=rngs,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=_INIT,
                use_bias=use_bias,
                stack=stack,
                lora_rank=rank if name in targets else 0,
                lora_alpha=cfg.get("lora_alpha", 1.0),
                lead=("batch", "length"),
            )

        norm: dict[str, Any] = dict(eps=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype, stack=stack)
        self.attn_norm = RMSNorm(cfg.hidden_size, **norm)
        self.attn = LlamaAttention(cfg, linear, norm)
        self.mlp_norm = RMSNorm(cfg.hidden_size, **norm)
        self.mlp = LlamaMLP(cfg, linear)

    def __call__(self, x: jax.Array, segment_ids: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        """A whole packed row: x [B, L, D] -> [B, L, D]."""
        q, k, v = self.attn.project(self.attn_norm(x), rope)
        ids = segment_ids
        out = attention(q, k, v, segment_ids_q=ids, segment_ids_kv=ids, causal=True, length="length")
        return self._finish(x, out)

    def with_cache(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: Cache,
        layer: jax.Array,
        slots: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """Continues cached rows: token i of row b writes slot `slots[b, i]` and sees it and all before."""
        q, k, v = self.attn.project(self.attn_norm(x), rope)
        rows = jnp.arange(x.shape[0])[:, None]
        # 'drop', because a row near its end may carry padding beyond the cache; clamping would overwrite
        # real slots.
        cache = {
            "k": cache["k"].at[layer, rows, slots].set(k.astype(cache["k"].dtype), mode="drop"),
            "v": cache["v"].at[layer, rows, slots].set(v.astype(cache["v"].dtype), mode="drop"),
        }
        keys = jax.lax.dynamic_index_in_dim(cache["k"], layer, keepdims=False).astype(q.dtype)
        values = jax.lax.dynamic_index_in_dim(cache["v"], layer, keepdims=False).astype(q.dtype)
        out = attention(
            q, keys, values, causal=True, q_positions=slots, kv_positions=jnp.arange(keys.shape[1])[None]
        )
        return self._finish(x, out), cache

    def _finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = shard(x + self.attn.output(attended), "batch", "length", "embed")
        return shard(x + self.mlp(self.mlp_norm(x)), "batch", "length", "embed")


class Llama(nnx.Module):
    """Decoder-only language model. Inputs are embeddings, so that visual tokens can stand among text."""

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str):
        if cfg.num_heads % cfg.num_kv_heads:
            raise UserError(
                f"model.llm.num_heads={cfg.num_heads} is no multiple of num_kv_heads={cfg.num_kv_heads}"
            )
        if cfg.head_dim % 2:
            raise UserError(
                f"model.llm.head_dim={cfg.head_dim}: must be even, as rotary positions turn pairs"
            )
        self.remat = remat
        self.dtype = jnp.dtype(dtype)
        self.head_dim = cfg.head_dim
        # A tuple: what is not a parameter is part of the structure, which must be hashable.
        self.rope_frequencies = tuple(
            rope_frequencies(cfg.head_dim, float(cfg.rope_theta), cfg.get("rope_scaling")).tolist()
        )
        self.num_layers = cfg.num_layers
        self.num_kv_heads = cfg.num_kv_heads
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.embed = Embed(cfg.vocab_size, cfg.hidden_size, lead=("batch", "length"), **kwargs)
        self.layers = LlamaLayer(cfg, stack=(cfg.num_layers,), **kwargs)
        self.final_norm = RMSNorm(cfg.hidden_size, eps=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.lm_head = (
            None
            if cfg.tie_embeddings
            else Linear(cfg.hidden_size, cfg.vocab_size, kernel_init=_INIT, use_bias=False, **kwargs)
        )

    def head_kernel(self) -> jax.Array:
        """[D, V] in the parameters' type; the transposed embedding if tied."""
        return self.embed.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def head_stored(self) -> PartitionSpec | None:
        """Where the kernel of `head_kernel` lies in a sharded step."""
        if self.lm_head is not None:
            return logical_axes.stored("llm/lm_head/kernel")
        table = logical_axes.stored("llm/embed/embedding")
        return None if table is None else PartitionSpec(*reversed((*table, None, None)[:2]))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V]; for generation, where few positions are asked for."""
        return jnp.matmul(hidden, self.head_kernel().astype(hidden.dtype), preferred_element_type=jnp.float32)

    def __call__(self, embeds: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Packed rows without a cache.

        Args:
          embeds: [B, L, D].
          segment_ids: int [B, L]; tokens see earlier tokens of their own segment; 0 is padding.
          positions: int [B, L], rotary positions, which restart in each segment.

        Returns:
          [B, L, D] after the final norm; meaningless but finite at padding.
        """
        rope = rope_tables(positions, np.asarray(self.rope_frequencies, np.float32))
        x = shard(embeds.astype(self.dtype), "batch", "length", "embed")
        x = run_stack(self.layers, x, segment_ids, rope, remat=self.remat)
        return self.final_norm(x)

    def init_cache(self, batch: int, size: int, dtype: Any = None) -> Cache:
        """Empty cache: k and v, each [layers, batch, size, kv heads, head dim]."""
        shape = (self.num_layers, batch, size, self.num_kv_heads, self.head_dim)
        dtype = self.dtype if dtype is None else dtype
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def forward_cached(
        self, embeds: jax.Array, positions: jax.Array, cache: Cache, write_at: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Continues rows whose earlier tokens are cached: whole prefill, chunked prefill and single steps.

        Token i of row b goes to slot `write_at[b] + i` and sees slots 0 .. `write_at[b] + i`. A chunk
        shorter than Q is padded on the right: advance `write_at` by its true length, and the next call
        overwrites what the padding left. Writes beyond the cache are dropped.

        Args:
          embeds: [B, Q, D].
          positions: int [B, Q], rotary positions.
          cache: from `init_cache` or an earlier call.
          write_at: int [B], tokens already cached in each row.

        Returns:
          (hidden [B, Q, D] after the final norm, the new cache).
        """
        rope = rope_tables(positions, np.asarray(self.rope_frequencies, np.float32))
        slots = write_at[:, None] + jnp.arange(embeds.shape[1])[None]
        graphdef, params = compat.split(self.layers)

        # The cache is carried, not scanned over, so that each layer's write happens in place.
        def body(
            carry: tuple[jax.Array, Cache], layer: tuple[Any, jax.Array]
        ) -> tuple[tuple[jax.Array, Cache], None]:
            x, cache = carry
            return compat.merge(graphdef, layer[0]).with_cache(x, rope, cache, layer[1], slots), None

        x = shard(embeds.astype(self.dtype), "batch", "length", "embed")
        (x, cache), _ = jax.lax.scan(body, (x, cache), (params, jnp.arange(self.num_layers)))
        return self.final_norm(x), cache
