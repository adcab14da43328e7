"""The decoder-only language model that all LLM families share; a family supplies the layer.

Inputs are embeddings, so that image tokens can be placed among text. The same layers run over packed rows
(training) and over rows with a KV cache (generation); see `DecoderLayer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models.layers import Embed, Linear, RMSNorm, remat_layer, scan_layers
from vilam3_jax.ops.attention import MaskInfo, attention
from vilam3_jax.runtime import compat
from vilam3_jax.runtime.settings import Section, setting
from vilam3_jax.sharding.logical_axes import shard
from vilam3_jax.sharding.weights import as_weight

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
INIT = jax.nn.initializers.normal(0.02)

Cache = dict[str, jax.Array]
Rope = tuple[jax.Array, jax.Array]  # cosines and sines, see `rope_tables`
# q [B, L, H, hd], k and v [B, L, K, hd] -> (attended [B, L, H, hd], what the pass carries on)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


# Weights are split over `fsdp` on one dimension and over `tensor` on the other; vectors are replicated. The
# stacked layer axis leads and is never split. Further specs of a row are fallbacks, tried in order when a
# dimension is not divisible: VILA's vocabularies are odd (128,257).
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
    """What the sections of all LLM families have.

    Attributes:
      type: name of the family.
      vocab_size: V, rows of the embedding table.
      hidden_size: D.
      num_layers: decoder layers.
      num_heads: query heads H.
      num_kv_heads: key and value heads K.
      head_dim: hd.
      mlp_dim: width of the gated MLP.
      norm_eps: epsilon of the norms.
      max_positions: context length that the weights were trained for; only exports state it.
      tie_embeddings: whether the head is the transposed embedding table.
      lora_rank: of the adapters; 0 for none.
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
        `original_max_positions / high_freq_factor`, and interpolates in between.

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
    """Cosines and sines of rotary positions.

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
    # TPUs move half a head across lanes slowly; multiplying by a permutation is nearly free, and exact with
    # bfloat16 factors.
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


class LayerKind(NamedTuple):
    """What differs between the layers of a model, apart from parameters.

    Attributes:
      window: keys that a token sees, itself included; None for all earlier ones.
      rope: index of its table of rotary frequencies.
    """

    window: int | None = None
    rope: int = 0


class DecoderLayer(Protocol):
    """A layer: `layer(x, rope, attend) -> (x, carried)` with x [B, L, D].

    It projects q, k and v, rotates q and k, and calls `attend`, which knows about packing or the KV cache and
    returns something to carry on, such as the new cache.
    """

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        """Returns the new x and what `attend` carried on."""
        ...


def lora_linear(
    cfg: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, stack: tuple[int, ...]
) -> Callable[..., Linear]:
    """Returns `linear(name, in, out, use_bias=False)`, with LoRA on the projections that `cfg` targets."""

    def linear(name: str, in_features: Any, out_features: Any, use_bias: bool = False) -> Linear:
        return Linear(
            in_features,
            out_features,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=INIT,
            use_bias=use_bias,
            stack=stack,
            lora_rank=cfg.lora_rank if name in cfg.lora_targets else 0,
            lora_alpha=cfg.lora_alpha,
        )

    return linear


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
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        remat: str,
    ):
        """Builds the model.

        Args:
          cfg: `config.model.llm`.
          layer: makes the stacked layers: `layer(cfg, stack=..., rngs=..., dtype=..., param_dtype=...)`.
          norm: of the last hidden state.
          embed: makes the embedding table.
          kinds: of every layer.
          frequencies: rotary tables that `LayerKind.rope` indexes, float32 [head_dim / 2] each.
          attention_scale: multiplies the scores; 1/sqrt(head_dim) by default.
          rngs: random streams of the parameters.
          dtype: of activations.
          param_dtype: of parameters.
          remat: see `layers.remat_layer`.
        """
        self.remat, self.kinds, self.attention_scale = remat, kinds, attention_scale
        self.dtype = jnp.dtype(dtype)
        # Tuples, because static attributes must be hashable.
        self.frequencies = tuple(tuple(table.tolist()) for table in frequencies)
        self.cache_shape = (cfg.num_kv_heads, cfg.head_dim)
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.embed = embed(cfg.vocab_size, cfg.hidden_size, **kwargs)
        self.layers = layer(cfg, stack=(cfg.num_layers,), **kwargs)
        self.final_norm = norm(cfg.hidden_size, eps=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.lm_head = (
            None
            if cfg.tie_embeddings
            else Linear(cfg.hidden_size, cfg.vocab_size, kernel_init=INIT, use_bias=False, **kwargs)
        )

    def head_kernel(self) -> Any:
        """Matrix [D, V] of the head, an array or a `Weight`; the transposed embedding table if tied."""
        return self.embed.embedding.get_value().T if self.lm_head is None else self.lm_head.kernel.get_value()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V]; for generation, which needs few positions."""
        kernel = as_weight(self.head_kernel()).value
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def __call__(self, embeds: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Packed rows without a cache.

        Args:
          embeds: [B, L, D].
          segment_ids: int [B, L]; tokens see earlier tokens of their own segment; 0 is padding.
          positions: int [B, L], rotary positions, which restart in each segment.

        Returns:
          [B, L, D] after the final norm; meaningless but finite at padding.
        """
        graphdef, params = compat.split(cast(nnx.Module, self.layers))
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

    def init_cache(self, batch: int, size: int, dtype: Any = None) -> Cache:
        """Empty cache: k and v, each [layers, batch, size, kv heads, head dim]."""
        shape = (len(self.kinds), batch, size, *self.cache_shape)
        dtype = self.dtype if dtype is None else dtype
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def forward_cached(
        self, embeds: jax.Array, positions: jax.Array, cache: Cache, write_at: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Continues rows whose earlier tokens are cached: whole prefill, chunked prefill and single steps.

        Token i of row b goes to slot `write_at[b] + i` and sees slots 0 .. `write_at[b] + i`. A chunk
        shorter than Q is padded on the right: advance `write_at` by its true length, and the next call
        overwrites the padding. Writes beyond the cache are dropped.

        Args:
          embeds: [B, Q, D].
          positions: int [B, Q], rotary positions.
          cache: from `init_cache` or an earlier call.
          write_at: int [B], tokens already cached in each row.

        Returns:
          (hidden [B, Q, D] after the final norm, the new cache).
        """
        graphdef, params = compat.split(cast(nnx.Module, self.layers))
        ropes = self._ropes(positions)
        slots = write_at[:, None] + jnp.arange(embeds.shape[1])[None]
        rows = jnp.arange(embeds.shape[0])[:, None]

        # The cache is carried, not scanned over, so that each layer writes in place.
        def body(carry: tuple[jax.Array, Cache], layer: Any, kind: LayerKind) -> tuple[jax.Array, Cache]:
            x, cache = carry
            params, index = layer

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Cache]:
                # 'drop', because padding of a row near its end may lie beyond the cache; clamping would
                # overwrite real slots.
                written = {
                    "k": cache["k"].at[index, rows, slots].set(k.astype(cache["k"].dtype), mode="drop"),
                    "v": cache["v"].at[index, rows, slots].set(v.astype(cache["v"].dtype), mode="drop"),
                }
                keys = jax.lax.dynamic_index_in_dim(written["k"], index, keepdims=False).astype(q.dtype)
                values = jax.lax.dynamic_index_in_dim(written["v"], index, keepdims=False).astype(q.dtype)
                mask = MaskInfo(
                    q_positions=slots,
                    kv_positions=jnp.arange(keys.shape[1])[None],
                    causal=True,
                    window=kind.window,
                )
                return attention(q, keys, values, mask, scale=self.attention_scale), written

            return compat.merge(graphdef, params)(x, ropes[kind.rope], attend)

        x = shard(embeds.astype(self.dtype), "batch", "length", "embed")
        layers = (params, jnp.arange(len(self.kinds)))
        x, cache = scan_layers(body, (x, cache), layers, self.kinds)
        return self.final_norm(x), cache

    def _ropes(self, positions: jax.Array) -> list[Rope]:
        return [rope_tables(positions, np.asarray(table, np.float32)) for table in self.frequencies]
