"""The decoder-only language model that all LLM families share; a family supplies the layer.

Inputs are embeddings, so that image tokens can be inserted. The same layers run over packed rows (training)
and over rows with a KV cache (generation); see `DecoderLayer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vilam3_jax.errors import UserError
from vilam3_jax.models import kv_cache
from vilam3_jax.models.layers import Embed, Init, Linear, RMSNorm, StackInit, remat_layer, scan_layers
from vilam3_jax.ops.attention import MaskInfo, attention, cached_attention
from vilam3_jax.ops.quantized import QuantizedKernel, scaled_einsum
from vilam3_jax.runtime import compat
from vilam3_jax.runtime.settings import Section, setting
from vilam3_jax.sharding.logical_axes import shard
from vilam3_jax.sharding.matmul import at_least_sublanes
from vilam3_jax.sharding.weights import as_weight

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
INIT = jax.nn.initializers.normal(0.02)

_Carry = tuple[jax.Array, kv_cache.Cache, jax.Array]  # x, cache and index of the next layer
Rope = tuple[jax.Array, jax.Array]  # cosines and sines, see `rope_tables`
# q [B, L, H, hd], k and v [B, L, K, hd] -> (attended [B, L, H, hd], new cache or None)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


# Matrices are sharded over `fsdp` in one dimension and over `tensor` in the other; vectors are replicated,
# and the leading, stacked layer axis is never sharded. Further specs of a row are fallbacks for dimensions
# that are not divisible, such as VILA's vocabulary of 128,257.
PARAMETER_RULES = (
    (r"embed/embedding", ("tensor", "fsdp"), (None, ("fsdp", "tensor"))),
    (r"lm_head/kernel", ("fsdp", "tensor"), (("fsdp", "tensor"), None)),
    (r"layers/attn/[qkv]/kernel", (None, "fsdp", "tensor")),
    (r"layers/attn/o/kernel", (None, "tensor", "fsdp")),
    (r"layers/mlp/(gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"layers/mlp/down/kernel", (None, "tensor", "fsdp")),
    (r"layers/.*/lora_a", (None, "fsdp", None)),
    (r"layers/.*/lora_b", (None, None, "fsdp")),
    (r".*(scale|bias)", ()),
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Section):
    """Fields of the sections of all LLM families.

    Attributes:
      type: name of the family.
      vocab_size: V, rows of the embedding table.
      hidden_size: width D.
      num_layers: number of layers.
      num_heads: H, query heads.
      num_kv_heads: K, key and value heads; divides H.
      head_dim: hd, width of a head.
      mlp_dim: hidden width of the MLP.
      norm_eps: added to the mean square in normalisation layers.
      max_positions: context length that the weights were trained for; written to exports only.
      tie_embeddings: whether the head is the transposed embedding table.
      lora_rank: rank of the adapters; 0 for none.
      lora_alpha: scale of the adapters times their rank.
      lora_targets: projections with adapters.
    """

    key = "model.llm"
    type: str
    vocab_size: int = setting(at_least=1)
    hidden_size: int = setting(at_least=1)
    num_layers: int = setting(at_least=1)
    num_heads: int = setting(at_least=1)
    num_kv_heads: int = setting(at_least=1)
    head_dim: int = setting(at_least=1)
    mlp_dim: int = setting(at_least=1)
    norm_eps: float = setting(default=1e-6, at_least=0)
    max_positions: int = setting(default=2048, at_least=1)
    tie_embeddings: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()

    def validate(self) -> None:
        """Checks heads and LoRA targets."""
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.llm.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.llm.head_dim={self.head_dim}: must be even, as rotary embeddings rotate channel pairs"
            )
        targets = tuple(self.lora_targets)
        if self.lora_rank < 0 or (self.lora_rank and not targets):
            raise UserError(
                f"model.llm.lora_rank={self.lora_rank} with lora_targets={targets}: use rank 0 for no LoRA, "
                f"or a positive rank and targets from {LORA_TARGETS}"
            )
        if unknown := sorted(set(targets) - set(LORA_TARGETS)):
            raise UserError(f"model.llm.lora_targets has unknown {unknown}; choose from {LORA_TARGETS}")


def rope_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> np.ndarray:
    """Angles per position of the channel pairs of a head (arXiv:2104.09864).

    Args:
      head_dim: even width of a head.
      theta: base of the frequencies.
      scaling: None, or a mapping with `type`. 'linear' divides all frequencies by `factor`. 'llama3'
        (Llama 3.1) divides those by `factor` whose wavelength exceeds
        `original_max_positions / low_freq_factor`, keeps those whose wavelength is less than
        `original_max_positions / high_freq_factor`, and interpolates in between. UserError for other types.

    Returns:
      float32 [head_dim / 2].
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
    """Cosines and sines, float32 [B, L, 1, hd / 2], of positions [B, L] and frequencies [hd / 2]."""
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
    # TPUs move half a head across lanes slowly; a product with a permutation is nearly free, and exact in
    # bfloat16.
    half = x.shape[-1] // 2
    turn = np.kron([[0, 1], [-1, 0]], np.eye(half))  # (first, second) -> (-second, first)
    turned = jnp.einsum("blhd,de->blhe", x, jnp.asarray(turn, x.dtype), preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


_rotate.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)),
    lambda kept, gradient: (_rotate(gradient, kept[0], -kept[1]), None, None),
)


class LayerKind(NamedTuple):
    """Differences between the layers of a model, apart from parameters."""

    window: int | None = None  # keys that a token attends to, itself included; None for all earlier ones
    rope: int = 0  # index of the table of rotary frequencies


class DecoderLayer(Protocol):
    """Projects q, k and v, rotates q and k, and calls `attend`, which handles packing or the KV cache."""

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        """Returns the new x [B, L, D] and the second result of `attend`."""
        ...


def lora_linear(cfg: DecoderConfig, **init: Unpack[StackInit]) -> Callable[..., Linear]:
    """Returns `linear(name, in, out, use_bias=False)`, with LoRA on the projections that `cfg` targets."""

    def linear(name: str, in_features: Any, out_features: Any, use_bias: bool = False) -> Linear:
        rank = cfg.lora_rank if name in cfg.lora_targets else 0
        lora: dict[str, Any] = dict(lora_rank=rank, lora_alpha=cfg.lora_alpha)
        return Linear(in_features, out_features, kernel_init=INIT, use_bias=use_bias, **lora, **init)

    return linear


class GroupedQueryAttention(nnx.Module):
    """Grouped-query self-attention (arXiv:2305.13245) with rotary embeddings.

    `qk_norm(head_dim)` makes the norms of query and key heads; None for no norms.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        linear: Callable[..., Linear],
        qk_norm: Callable[[int], nnx.Module] | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
    ):
        heads, kv_heads = (cfg.num_heads, cfg.head_dim), (cfg.num_kv_heads, cfg.head_dim)
        self.q = linear("q", cfg.hidden_size, heads, qkv_bias)
        self.k = linear("k", cfg.hidden_size, kv_heads, qkv_bias)
        self.v = linear("v", cfg.hidden_size, kv_heads, qkv_bias)
        self.o = linear("o", heads, cfg.hidden_size, o_bias)
        self.q_norm: Any = None if qk_norm is None else qk_norm(cfg.head_dim)
        self.k_norm: Any = None if qk_norm is None else qk_norm(cfg.head_dim)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        """[B, L, D] -> [B, L, D]."""
        q = shard(self.q(x), "batch", "length", "heads", None)
        k = shard(self.k(x), "batch", "length", "kv_heads", None)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        v = shard(self.v(x), "batch", "length", "kv_heads", None)
        attended, new_cache = attend(*(checkpoint_name(y, "qkv") for y in (q, k, v)))
        return self.o(shard(attended, "batch", "length", "heads", None)), new_cache


class GatedMLP(nnx.Module):
    """Gated MLP; with SiLU it is SwiGLU (arXiv:2002.05202)."""

    def __init__(self, cfg: DecoderConfig, linear: Callable[..., Linear], activation: Any = jax.nn.silu):
        self.activation = activation
        self.gate = linear("gate", cfg.hidden_size, cfg.mlp_dim)
        self.up = linear("up", cfg.hidden_size, cfg.mlp_dim)
        self.down = linear("down", cfg.mlp_dim, cfg.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(shard(self.gate(x), "batch", "length", "mlp"), "mlp")
        up = checkpoint_name(shard(self.up(x), "batch", "length", "mlp"), "mlp")
        return self.down(self.activation(gate) * up)


class Decoder(nnx.Module):
    """Decoder-only language model over embeddings.

    A family subclasses it and calls `__init__` with its layer, its rotary tables and the kind of each layer.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        layer: Callable[..., DecoderLayer],
        norm: Callable[..., nnx.Module] = RMSNorm,
        embed: Callable[..., Embed] = Embed,
        *,
        kinds: tuple[LayerKind, ...],
        frequencies: tuple[np.ndarray, ...],
        attention_scale: float | None = None,
        remat: str,
        **init: Unpack[Init],
    ):
        """Builds the model.

        Args:
          cfg: the section `model.llm`.
          layer: class of the stacked layers, called with `(cfg, **init)`.
          norm: class of the final norm.
          embed: class of the embedding table.
          kinds: kind of every layer.
          frequencies: rotary tables that `LayerKind.rope` indexes, float32 [head_dim / 2] each.
          attention_scale: multiplies the scores; 1/sqrt(head_dim) by default.
          remat: see `layers.remat_layer`.
          **init: see `layers.Init`.
        """
        self.remat, self.kinds, self.attention_scale = remat, kinds, attention_scale
        self.dtype = jnp.dtype(init["dtype"])
        # Tuples, because static attributes must be hashable.
        self.frequencies = tuple(tuple(table.tolist()) for table in frequencies)
        self.cache_shape = (cfg.num_kv_heads, cfg.head_dim)
        self.embed = embed(cfg.vocab_size, cfg.hidden_size, **init)
        self.layers: Any = layer(cfg, stack=(cfg.num_layers,), **init)
        self.final_norm = norm(cfg.hidden_size, eps=cfg.norm_eps, **init)
        head = partial(Linear, cfg.hidden_size, cfg.vocab_size, kernel_init=INIT, use_bias=False)
        self.lm_head = None if cfg.tie_embeddings else head(**init)

    def head_kernel(self) -> Any:
        """Matrix [D, V] of the head, an array or a `Weight`; the transposed embedding table if tied."""
        return self.embed.embedding.get_value().T if self.lm_head is None else self.lm_head.kernel.get_value()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V]; for generation, which needs few positions."""
        if self.lm_head is None:
            stored, axes = self.embed.embedding.get_value(), "oi"
        else:
            stored, axes = self.lm_head.kernel.get_value(), "io"
        kernel, lead = as_weight(stored).value.astype(hidden.dtype), hidden.shape[:-1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        einsum = scaled_einsum if isinstance(kernel, QuantizedKernel) else jnp.einsum
        rows = at_least_sublanes(flat)
        logits = einsum(f"ai,{axes}->ao", rows, kernel, preferred_element_type=jnp.float32)
        return logits[: len(flat)].reshape(*lead, -1)

    def __call__(self, embeds: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Packed rows without a cache: [B, L, D] -> [B, L, D] after the final norm.

        Args:
          embeds: [B, L, D].
          segment_ids: int [B, L]; tokens attend to earlier tokens of their segment; 0 is padding, where the
            result is arbitrary but finite.
          positions: int [B, L], rotary positions, which restart in each segment.
        """
        graphdef, params = compat.split(self.layers)
        ropes = self._ropes(positions)

        def body(x: jax.Array, layer: Any, kind: LayerKind) -> jax.Array:
            mask = MaskInfo(segment_ids, segment_ids, causal=True, window=kind.window)

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
                return attention(q, k, v, mask, scale=self.attention_scale), None

            def run(x: jax.Array, layer: Any) -> jax.Array:
                return compat.merge(graphdef, layer)(x, ropes[kind.rope], attend)[0]

            return remat_layer(run, self.remat)(x, layer)

        x = shard(embeds.astype(self.dtype), "batch", "length", "embed")
        return self.final_norm(scan_layers(body, x, params, self.kinds))

    def init_cache(self, batch: int, size: int, dtype: Any = None) -> kv_cache.Cache:
        """Empty cache, of the type of the activations by default; see `kv_cache`."""
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        return kv_cache.empty(len(self.kinds), batch, size, *self.cache_shape, dtype)

    def forward_cached(
        self, embeds: jax.Array, positions: jax.Array, cache: kv_cache.Cache, write_at: jax.Array
    ) -> tuple[jax.Array, kv_cache.Cache]:
        """Runs tokens against the KV cache: full prefill, chunked prefill or single-token decoding.

        Token i of row b is written to slot `write_at[b] + i` and attends to slots up to it. A chunk shorter
        than Q is padded on the right: advance `write_at` by its true length, and the next call overwrites the
        padding. Writes beyond the cache are dropped.

        Args:
          embeds: [B, Q, D].
          positions: int [B, Q], rotary positions.
          cache: from `init_cache` or an earlier call.
          write_at: int [B], tokens already cached in each row.

        Returns:
          (hidden [B, Q, D] after the final norm, the new cache).
        """
        graphdef, params = compat.split(self.layers)
        ropes = self._ropes(positions)
        slots = write_at[:, None] + jnp.arange(embeds.shape[1])[None]

        # The cache is a carry of the scan, not scanned over, so that each layer writes in place. So is the
        # index of the layer: a scalar, where a scan over indices would slice an array.
        def body(carry: _Carry, params: Any, kind: LayerKind) -> _Carry:
            x, cache, index = carry

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, kv_cache.Cache]:
                written = kv_cache.write(cache, index, slots, k, v)
                stacked = written["k"], written["v"], index
                how: dict[str, Any] = dict(window=kind.window, scale=self.attention_scale)
                if (attended := cached_attention(q, *stacked, slots[:, 0], **how)) is not None:
                    return attended, written
                keys, values = kv_cache.read(written, index, q.dtype)
                where: dict[str, Any] = dict(q_positions=slots, kv_positions=jnp.arange(keys.shape[1])[None])
                mask = MaskInfo(**where, causal=True, window=kind.window)
                return attention(q, keys, values, mask, scale=self.attention_scale), written

            return *compat.merge(graphdef, params)(x, ropes[kind.rope], attend), index + 1

        x = shard(embeds.astype(self.dtype), "batch", "length", "embed")
        x, cache, _ = scan_layers(body, (x, cache, jnp.int32(0)), params, self.kinds)
        return self.final_norm(x), cache

    def _ropes(self, positions: jax.Array) -> list[Rope]:
        return [rope_tables(positions, np.asarray(table, np.float32)) for table in self.frequencies]
