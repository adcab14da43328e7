"""Gemma 3 (arXiv:2503.19786), the text model: the LLM of MedGemma.

The layout is that of Hugging Face's Gemma3ForCausalLM. Most layers attend to a sliding window with their own
rotary base; every sixth attends to all earlier tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vilam3_jax.errors import UserError
from vilam3_jax.models import decoder_layout, families
from vilam3_jax.models.decoder import (
    PARAMETER_RULES,
    Attend,
    Decoder,
    DecoderConfig,
    LayerKind,
    Rope,
    apply_rope,
    lora_linear,
    rope_frequencies,
)
from vilam3_jax.models.hugging_face import KEEP, TensorRule, number, refuse, size, subsection, whole
from vilam3_jax.models.layers import Embed
from vilam3_jax.runtime.settings import setting
from vilam3_jax.sharding.logical_axes import shard

_SLIDING, _FULL = "sliding_attention", "full_attention"
_PATTERN = 6  # by default every sixth layer attends to everything


@dataclasses.dataclass(frozen=True)
class Gemma3Config(DecoderConfig):
    """The section `model.llm` of a Gemma 3.

    Attributes:
      rope_theta: base of the rotary frequencies of layers with full attention.
      rope_scaling: of those frequencies, see `decoder.rope_frequencies`.
      local_rope_theta: base of the frequencies of layers with a sliding window.
      local_rope_scaling: of those frequencies.
      sliding_window: keys that a token sees in these layers, itself included.
      layer_types: 'sliding_attention' or 'full_attention' for each layer; empty for five of the first, then
        one of the second, repeated.
      query_scale: s, where scores are multiplied by s**-0.5 (`query_pre_attn_scalar`).
    """

    rope_theta: float = 1_000_000.0
    rope_scaling: Mapping[str, Any] | None = None
    local_rope_theta: float = 10_000.0
    local_rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int = setting(default=4096, at_least=1)
    layer_types: tuple[str, ...] = ()
    query_scale: int = setting(default=256, at_least=1)

    def validate(self) -> None:
        """Fills in and checks the types of the layers."""
        super().validate()
        if not self.layer_types:
            types = (_FULL if (i + 1) % _PATTERN == 0 else _SLIDING for i in range(self.num_layers))
            object.__setattr__(self, "layer_types", tuple(types))
        if len(self.layer_types) != self.num_layers or not set(self.layer_types) <= {_SLIDING, _FULL}:
            raise UserError(
                f"config model.llm.layer_types={self.layer_types}: give {_SLIDING!r} or {_FULL!r} for each "
                f"of the {self.num_layers} layers"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of every layer; None for full attention."""
        return tuple(self.sliding_window if kind == _SLIDING else None for kind in self.layer_types)


class Gemma3RMSNorm(nnx.Module):
    """Root-mean-square norm whose scale is stored as its distance from 1; computed in float32."""

    def __init__(self, width: int, *, eps: float, dtype: Any, param_dtype: Any, stack: tuple[int, ...] = ()):
        self.eps, self.dtype = float(eps), jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.zeros((*stack, width), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        return (x * (1 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


class Gemma3Embed(Embed):
    """Embedding table whose rows are multiplied by sqrt(width), a factor rounded to the type of the weights.

    Image tokens, which do not come from the table, are not scaled; nor is the table as a tied head.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.embedding.get_value()
        factor = jnp.asarray(table.shape[-1] ** 0.5, self.dtype)
        return super().__call__(ids) * factor


class Gemma3Layer(nnx.Module):
    """Decoder layer with a norm before and after attention and MLP."""

    def __init__(
        self, cfg: Gemma3Config, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, stack: tuple[int, ...] = ()
    ):
        linear = lora_linear(cfg, rngs=rngs, dtype=dtype, param_dtype=param_dtype, stack=stack)
        norm = partial(Gemma3RMSNorm, eps=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype, stack=stack)
        self.attn_norm = norm(cfg.hidden_size)
        self.attn = Gemma3Attention(cfg, linear, norm)
        self.post_attn_norm = norm(cfg.hidden_size)
        self.mlp_norm = norm(cfg.hidden_size)
        self.mlp = Gemma3MLP(cfg, linear)
        self.post_mlp_norm = norm(cfg.hidden_size)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        attended, carried = self.attn(self.attn_norm(x), rope, attend)
        x = shard(x + self.post_attn_norm(attended), "batch", "length", "embed")
        moved = self.post_mlp_norm(self.mlp(self.mlp_norm(x)))
        return shard(x + moved, "batch", "length", "embed"), carried


class Gemma3Attention(nnx.Module):
    """Grouped-query self-attention with normalised queries and keys."""

    def __init__(self, cfg: Gemma3Config, linear: Any, norm: Any):
        heads, kv_heads = (cfg.num_heads, cfg.head_dim), (cfg.num_kv_heads, cfg.head_dim)
        self.q = linear("q", cfg.hidden_size, heads)
        self.k = linear("k", cfg.hidden_size, kv_heads)
        self.v = linear("v", cfg.hidden_size, kv_heads)
        self.o = linear("o", heads, cfg.hidden_size)
        self.q_norm, self.k_norm = norm(cfg.head_dim), norm(cfg.head_dim)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        q = self.q_norm(shard(self.q(x), "batch", "length", "heads", None))
        k = self.k_norm(shard(self.k(x), "batch", "length", "kv_heads", None))
        v = shard(self.v(x), "batch", "length", "kv_heads", None)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        attended, carried = attend(*(checkpoint_name(y, "qkv") for y in (q, k, v)))
        return self.o(shard(attended, "batch", "length", "heads", None)), carried


class Gemma3MLP(nnx.Module):
    """Gated MLP with a tanh-approximated GELU."""

    def __init__(self, cfg: Gemma3Config, linear: Any):
        self.gate = linear("gate", cfg.hidden_size, cfg.mlp_dim)
        self.up = linear("up", cfg.hidden_size, cfg.mlp_dim)
        self.down = linear("down", cfg.mlp_dim, cfg.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(shard(self.gate(x), "batch", "length", "mlp"), "mlp")
        up = checkpoint_name(shard(self.up(x), "batch", "length", "mlp"), "mlp")
        return self.down(jax.nn.gelu(gate, approximate=True) * up)


class Gemma3(Decoder):
    """See the module."""

    def __init__(self, cfg: Gemma3Config, **kwargs: Any):
        super().__init__(
            cfg,
            Gemma3Layer,
            Gemma3RMSNorm,
            Gemma3Embed,
            kinds=tuple(LayerKind(window, 0 if window is None else 1) for window in cfg.windows),
            frequencies=(
                rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling),
                rope_frequencies(cfg.head_dim, cfg.local_rope_theta, cfg.local_rope_scaling),
            ),
            attention_scale=cfg.query_scale**-0.5,
            **kwargs,
        )


def read_config(values: Mapping[str, Any], where: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of a Gemma 3 text model into a section.

    Raises:
      UserError: a key is missing, or asks for what this family does not do.
    """
    if values.get("model_type") == "gemma3":
        raise UserError(
            f"{where}: model_type 'gemma3' has a vision tower, which is not supported; save its text "
            "model alone"
        )
    refuse(
        values,
        where,
        {
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False, None),
            "use_bidirectional_attention": (False, None),
            # transformers ignores `attn_logit_softcapping` for this model, even if it is set.
            "final_logit_softcapping": (None,),
        },
    )
    layers = size(values, "num_hidden_layers", where)
    types = values.get("layer_types")
    if types is None:
        pattern = size({**values, **_older(values)}, "sliding_window_pattern", where, _PATTERN)
        types = [_FULL if (i + 1) % pattern == 0 else _SLIDING for i in range(layers)]
    defaults = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    return {
        "type": "gemma3",
        **decoder_layout.read_sizes({**defaults, **values}, where),
        **_read_ropes(values, where),
        "max_positions": size(values, "max_position_embeddings", where, 131_072),
        "sliding_window": whole(values.get("sliding_window", 4096), f"{where}: sliding_window"),
        "layer_types": tuple(types),
        "query_scale": size(values, "query_pre_attn_scalar", where, 256),
        "tie_embeddings": bool(values.get("tie_word_embeddings", True)),
    }


def _older(values: Mapping[str, Any]) -> dict[str, Any]:
    pattern = values.get("sliding_window_pattern", values.get("_sliding_window_pattern"))
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def _read_ropes(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Rotary settings by layer type; older files state them by key, with a scaling of full layers only."""
    nested = subsection(values, "rope_parameters", where)
    by_type = {kind: subsection(nested, kind, where) for kind in (_FULL, _SLIDING)}
    if nested and not any(by_type.values()):
        raise UserError(
            f"{where}: rope_parameters={nested!r} names neither {_FULL} nor {_SLIDING}; download it again"
        )
    if not nested:
        by_type = {_FULL: {**subsection(values, "rope_scaling", where)}, _SLIDING: {}}
    full, local = by_type[_FULL], by_type[_SLIDING]
    return {
        "rope_theta": number({**values, **full}, "rope_theta", where, 1_000_000.0),
        "rope_scaling": decoder_layout.read_scaling(full, f"{where}: rope_parameters.{_FULL}"),
        "local_rope_theta": number(
            {"rope_theta": values.get("rope_local_base_freq"), **local}, "rope_theta", where, 10_000.0
        ),
        "local_rope_scaling": decoder_layout.read_scaling(local, f"{where}: rope_parameters.{_SLIDING}"),
    }


def write_config(llm: Gemma3Config, dtype: str) -> dict[str, Any]:
    """The config.json of a section, with the keys of transformers 4 and 5."""
    full = {"rope_theta": llm.rope_theta, **decoder_layout.write_scaling(llm.rope_scaling)}
    local = {"rope_theta": llm.local_rope_theta, **decoder_layout.write_scaling(llm.local_rope_scaling)}
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        **decoder_layout.write_sizes(llm, dtype),
        "attention_bias": False,
        "rope_parameters": {_FULL: full, _SLIDING: local},
        "rope_theta": llm.rope_theta,
        "rope_local_base_freq": llm.local_rope_theta,
        "sliding_window": llm.sliding_window,
        "layer_types": list(llm.layer_types),
        "query_pre_attn_scalar": llm.query_scale,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }
    if llm.rope_scaling:
        config["rope_scaling"] = decoder_layout.write_scaling(llm.rope_scaling)
    return config


def tensors(llm: Gemma3Config) -> list[TensorRule]:
    """Hugging Face's tensors."""
    return decoder_layout.decoder_tensors(
        llm,
        [
            ("attn_norm/scale", "input_layernorm.weight", KEEP),
            ("post_attn_norm/scale", "post_attention_layernorm.weight", KEEP),
            ("mlp_norm/scale", "pre_feedforward_layernorm.weight", KEEP),
            ("post_mlp_norm/scale", "post_feedforward_layernorm.weight", KEEP),
            *decoder_layout.projections(normed="qk"),
        ],
    )


def _without_wrapper(names: Collection[str]) -> dict[str, str]:
    """Strips the names of the multimodal model that the text model may be stored under."""
    wrapper = re.compile(r"(language_model\.(?=model\.|lm_head\.)|(?<=model\.)language_model\.)")
    return {name: wrapper.sub("", name, count=1) for name in names}


FAMILY = families.ModelFamily(
    name="gemma3",
    component="llm",
    config=Gemma3Config,
    module=Gemma3,
    parameter_rules=PARAMETER_RULES,
    hugging_face=families.HuggingFaceLayout(
        model_types=("gemma3_text", "gemma3"),
        read_config=read_config,
        write_config=write_config,
        tensors=tensors,
        rename=_without_wrapper,
    ),
    attention_windows=lambda llm: llm.windows,
)
