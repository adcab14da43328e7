"""Llama, with Qwen2 and Qwen3 as variants of its config: the LLMs of VILA-1.5, VILA-M3 and NVILA.

Layouts are those of Hugging Face's LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import jax
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
from vilam3_jax.models.hugging_face import KEEP, TensorRule, flag, refuse, size
from vilam3_jax.models.layers import RMSNorm, StackInit
from vilam3_jax.sharding.logical_axes import shard

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# transformers' values of keys that config.json lacks.
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
_DEFAULTS = {"llama": {"max_position_embeddings": 2048}, "qwen2": _QWEN_DEFAULTS, "qwen3": _QWEN_DEFAULTS}
_QWEN3_HEAD_DIM = 128


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """The section `model.llm` of a Llama, Qwen2 or Qwen3.

    Attributes:
      rope_theta: base of the rotary frequencies.
      rope_scaling: see `decoder.rope_frequencies`.
      qkv_bias: biases of the q, k and v projections (Qwen2).
      o_bias: bias of the output projection.
      qk_norm: RMS norm of each query and key head before the rotation (Qwen3).
    """

    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False


class LlamaLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, cfg: LlamaConfig, **init: Unpack[StackInit]):
        linear, norm = lora_linear(cfg, **init), partial(RMSNorm, eps=cfg.norm_eps, **init)
        self.attn_norm = norm(cfg.hidden_size)
        qk_norm = norm if cfg.qk_norm else None
        self.attn = GroupedQueryAttention(cfg, linear, qk_norm, cfg.qkv_bias, cfg.o_bias)
        self.mlp_norm = norm(cfg.hidden_size)
        self.mlp = GatedMLP(cfg, linear)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        attended, new_cache = self.attn(self.attn_norm(x), rope, attend)
        x = shard(x + attended, "batch", "length", "embed")
        return shard(x + self.mlp(self.mlp_norm(x)), "batch", "length", "embed"), new_cache


class Llama(Decoder):
    """Llama decoder; see the module docstring."""

    def __init__(self, cfg: LlamaConfig, *, window: int | None = None, **kwargs: Any):
        frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        kinds = (LayerKind(window),) * cfg.num_layers
        super().__init__(cfg, LlamaLayer, kinds=kinds, frequencies=(frequencies,), **kwargs)


def read_config(values: Mapping[str, Any], where: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of a Llama, Qwen2 or Qwen3 into a section.

    Raises:
      UserError: a key is missing, or requests an unsupported feature.
    """
    family = values.get("model_type") or "llama"
    supported: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (1.0,),
    }
    if family == "llama":  # in Qwen's files the key has no effect without `use_sliding_window`
        supported["sliding_window"] = ()
    refuse(values, where, supported)
    types = values.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise UserError(f"{where}: layer_types={types!r} is not supported; choose another model")
    attention_bias = flag(values, "attention_bias", where)
    values = {**_DEFAULTS[family], **values}
    if family == "qwen3" and values.get("head_dim") is None:
        values = {**values, "head_dim": _QWEN3_HEAD_DIM}
    return {
        "type": "llama",
        **decoder_layout.read_sizes(values, where),
        **decoder_layout.read_rope(values, where, 10_000.0),
        "max_positions": size(values, "max_position_embeddings", where),
        # Qwen2 always has biases of q, k and v; its config.json does not state them.
        "qkv_bias": attention_bias or family == "qwen2",
        "o_bias": attention_bias and family != "qwen2",
        "qk_norm": family == "qwen3",
        "tie_embeddings": flag(values, "tie_word_embeddings", where),
    }


def write_config(llm: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a section.

    Raises:
      UserError: transformers has no architecture with these biases.
    """
    family = "qwen3" if llm.qk_norm else "qwen2" if (llm.qkv_bias, llm.o_bias) == (True, False) else "llama"
    if llm.qkv_bias != llm.o_bias and family != "qwen2":
        raise UserError(
            f"model.llm: no Hugging Face model has qkv_bias={llm.qkv_bias} with o_bias={llm.o_bias} and "
            f"qk_norm={llm.qk_norm}, so it cannot be exported"
        )
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        **decoder_layout.write_sizes(llm, dtype),
        **decoder_layout.write_rope(llm),
        **({} if family == "qwen2" else {"attention_bias": llm.qkv_bias}),
    }


def tensors(llm: LlamaConfig) -> list[TensorRule]:
    """Hugging Face's tensors; query and key columns have our rotate-half layout."""
    return decoder_layout.decoder_tensors(
        llm,
        [
            ("attn_norm/scale", "input_layernorm.weight", KEEP),
            ("mlp_norm/scale", "post_attention_layernorm.weight", KEEP),
            *decoder_layout.projections("qkv" * llm.qkv_bias + "o" * llm.o_bias, "qk" * llm.qk_norm),
        ],
    )


FAMILY = families.ModelFamily(
    name="llama",
    component="llm",
    config=LlamaConfig,
    module=Llama,
    parameter_rules=PARAMETER_RULES,
    hugging_face=families.HuggingFaceLayout(
        model_types=tuple(_ARCHITECTURES), read_config=read_config, write_config=write_config, tensors=tensors
    ),
)
