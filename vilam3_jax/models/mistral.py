"""Mistral (arXiv:2310.06825): Llama with a sliding window, the LLM of LLaVA-Med and BioMistral.

The layout is that of Hugging Face's MistralForCausalLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vilam3_jax.models import decoder_layout, families, llama
from vilam3_jax.models.decoder import PARAMETER_RULES
from vilam3_jax.models.hugging_face import refuse, whole
from vilam3_jax.runtime.settings import setting


@dataclasses.dataclass(frozen=True)
class MistralConfig(llama.LlamaConfig):
    """The section `model.llm` of a Mistral.

    Attributes:
      sliding_window: keys that a token sees in every layer, itself included; 0 for all.
    """

    sliding_window: int = setting(default=0, at_least=0)


class Mistral(llama.Llama):
    """Mistral decoder; see the module docstring."""

    def __init__(self, cfg: MistralConfig, **kwargs: Any):
        super().__init__(cfg, window=cfg.sliding_window or None, **kwargs)


def read_config(values: Mapping[str, Any], where: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of a Mistral into a section.

    Raises:
      UserError: a key is missing, or requests an unsupported feature.
    """
    supported = {"hidden_act": ("silu",), "layer_types": (None,), "partial_rotary_factor": (1.0, None)}
    refuse(values, where, supported)
    window = values.get("sliding_window", 4096)  # transformers' default; null turns it off
    return {
        "type": "mistral",
        **decoder_layout.read_sizes({"num_key_value_heads": 8, **values}, where),
        **decoder_layout.read_rope(values, where, 10_000.0),
        "max_positions": decoder_layout.size(values, "max_position_embeddings", where, 131_072),
        "sliding_window": 0 if window is None else whole(window, f"{where}: sliding_window"),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
    }


def write_config(llm: MistralConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a section."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        **decoder_layout.write_sizes(llm, dtype),
        **decoder_layout.write_rope(llm),
        "sliding_window": llm.sliding_window or None,
    }


FAMILY = families.ModelFamily(
    name="mistral",
    component="llm",
    config=MistralConfig,
    module=Mistral,
    parameter_rules=PARAMETER_RULES,
    hugging_face=families.HuggingFaceLayout(
        model_types=("mistral",), read_config=read_config, write_config=write_config, tensors=llama.tensors
    ),
    attention_windows=lambda llm: (llm.sliding_window or None,) * llm.num_layers,
)
