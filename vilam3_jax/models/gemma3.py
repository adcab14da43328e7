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
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models import decoder_layout, families
from vilam3_jax.models.decoder import (
    PARAMETER_RULES,
    Attend,
    Decoder,
    DecoderConfig,
    GatedMLP,
    GroupedQueryAttention,
    LayerKind,
    Rope,
    lora_linear,
    rope_frequencies,
)
from vilam3_jax.models.hugging_face import KEEP, TensorRule, number, refuse, size, subsection, whole
from vilam3_jax.models.layers import Embed, RMSNorm, StackInit
from vilam3_jax.runtime.settings import setting
from vilam3_jax.sharding.logical_axes import shard

_SLIDING, _FULL = "sliding_attention", "full_attention"
_PERIOD = 6  # by default every sixth layer has full attention


@dataclasses.dataclass(frozen=True)
class Gemma3Config(DecoderConfig):
    """The section `model.llm` of a Gemma 3.

    Attributes:
      rope_theta: base of the rotary frequencies of layers with full attention.
      rope_scaling: scaling of these frequencies, see `decoder.rope_frequencies`.
      local_rope_theta: base of the frequencies of layers with a sliding window.
      local_rope_scaling: scaling of these frequencies.
      sliding_window: keys that a token attends to in layers with a window, itself included.
      layer_types: 'sliding_attention' or 'full_attention' for each layer; empty for full attention in every
        sixth.
      query_scale: scores are multiplied by query_scale**-0.5 (`query_pre_attn_scalar`).
    """

    rope_theta: float = 1_000_000.0
    rope_scaling: Mapping[str, Any] | None = None
    local_rope_theta: float = 10_000.0
    local_rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int = setting(default=4096, at_least=1)
    layer_types: tuple[str, ...] = ()
    query_scale: int = setting(default=256, at_least=1)

    def validate(self) -> None:
        """Fills in the default `layer_types` and validates them."""
        super().validate()
        if not self.layer_types:
            object.__setattr__(self, "layer_types", _layer_types(self.num_layers, _PERIOD))
        if len(self.layer_types) != self.num_layers or not set(self.layer_types) <= {_SLIDING, _FULL}:
            raise UserError(
                f"config model.llm.layer_types={self.layer_types}: give {_SLIDING!r} or {_FULL!r} for each "
                f"of the {self.num_layers} layers"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of every layer; None for full attention."""
        return tuple(self.sliding_window if kind == _SLIDING else None for kind in self.layer_types)


class Gemma3RMSNorm(RMSNorm):
    """RMSNorm that multiplies by (1 + scale); computed in float32."""

    def __init__(self, width: int, *, eps: float, **init: Unpack[StackInit]):
        super().__init__(width, eps=eps, **init)
        self.scale = nnx.Param(jnp.zeros((*init.get("stack", ()), width), init["param_dtype"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (self.normalise(x) * (1 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


class Gemma3Embed(Embed):
    """Embedding table whose rows are multiplied by sqrt(width), rounded to the dtype of the activations.

    Image tokens, which do not come from the table, and the table as a tied head are not scaled.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        embeds = super().__call__(ids)
        return embeds * jnp.asarray(embeds.shape[-1] ** 0.5, self.dtype)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class Gemma3Layer(nnx.Module):
    """Decoder layer with a norm before and after attention and MLP."""

    def __init__(self, cfg: Gemma3Config, **init: Unpack[StackInit]):
        linear, norm = lora_linear(cfg, **init), partial(Gemma3RMSNorm, eps=cfg.norm_eps, **init)
        self.attn_norm, self.post_attn_norm = norm(cfg.hidden_size), norm(cfg.hidden_size)
        self.attn = GroupedQueryAttention(cfg, linear, norm)
        self.mlp_norm, self.post_mlp_norm = norm(cfg.hidden_size), norm(cfg.hidden_size)
        self.mlp = GatedMLP(cfg, linear, _gelu)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        attended, new_cache = self.attn(self.attn_norm(x), rope, attend)
        x = shard(x + self.post_attn_norm(attended), "batch", "length", "embed")
        output = self.post_mlp_norm(self.mlp(self.mlp_norm(x)))
        return shard(x + output, "batch", "length", "embed"), new_cache


class Gemma3(Decoder):
    """Gemma 3 text decoder; see the module docstring."""

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
      UserError: a key is missing, or requests an unsupported feature.
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
        key = "sliding_window_pattern"
        period = size({key: values.get(key, values.get(f"_{key}"))}, key, where, _PERIOD)
        types = _layer_types(layers, period)
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


def _layer_types(count: int, period: int) -> tuple[str, ...]:
    return tuple(_SLIDING if (i + 1) % period else _FULL for i in range(count))


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
