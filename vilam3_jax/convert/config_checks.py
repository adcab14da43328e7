"""Checks of settings beside the weights that no family reads; refuses those that change results."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vilam3_jax.convert.safetensors_files import read_config
from vilam3_jax.errors import UserError
from vilam3_jax.models.hugging_face import subsection

logger = logging.getLogger(__name__)

ORIGINAL = "import the unquantised model that it was made from"
# Keys of config.json that change results in the models that have them, unless the value is neutral.
_CHANGING = re.compile(
    r"alibi|use_alibi|attention_chunk_size|clip_qkv|no_rope_layers|pruned_heads|per_layer_config|rotary_pct"
    r"|(attention|embedding|residual)_multiplier|logit_scale|logits_scaling|scale_emb|scale_depth|dim_model_base"
    r"|final_logit_softcapping|query_pre_attn_scalar|qk_layernorm|use_qk_norm|add_cross_attention"
    r"|(num|num_local|n_routed)_experts|is_encoder_decoder|use_(bidirectional_attention|dynamic_ntk|logn_attn)"
)
# Keys for training, generation, labels and file handling, and keys that families read from a copy.
_HARMLESS = re.compile(
    r"_.*|unsloth.*|.*tokenizer.*|.*(token_id|token_ids|token_index|dropout|pdrop|penalty|_labels)"
    r"|(num|output|return|keys|task|tf|min|max|begin|forced|top|encoder)_(beam|attentions|hidden_states|scores"
    r"|return|dict|to_ignore|specific|legacy|length|suppress|bos|eos|k|p|no_repeat).*"
    r"|architectures|(torch_)?dtype|transformers_version|use_cache|initializer_.*|drop_path_rate|pretraining_tp"
    r"|auto_map|model_type|id2label|label2id|problem_type|finetuning_task|chunk_size_feed_forward|is_decoder"
    r"|gradient_checkpointing|use_flash_attn|attn_implementation|use_bfloat16|(model_)?max_length|padding_side"
    r"|torchscript|tie_encoder_decoder|cross_attention_hidden_size|prefix|neftune_noise_alpha|do_sample"
    r"|temperature|typical_p|early_stopping|no_repeat_ngram_size|suppress_tokens|exponential_decay_.*"
    r"|remove_invalid_values|projection_(dim|size)|vision_use_head|(vision|text|compression)_config|quantization.*"
    r"|rope_.*|max_window_layers|sliding_window|layer_types|.*_size|num_.*_(heads|layers)|head_dim|rms_norm_eps"
    r"|max_position_embeddings|attention_bias|tie_word_embeddings"
)
# Name parts of the tensors that quantisers store beside or instead of weights.
_QUANTISED = re.compile(
    r".*\.(weight_scale(_inv)?|scale_weight|(input|activation)_scale|qweight|qzeros|g_idx|scales|zeros"
    r"|weight_packed|weight_zero_point|absmax|quant_map|SCB)|.*\.quant_state\..*|scaled_fp8"
)
_STEPS = ("do_convert_rgb", "do_center_crop", "do_normalize", "do_rescale", "do_resize")


class RecordedKeys(dict[str, Any]):
    """The content of a config.json, towers' sections included, that records which keys are read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()
        for name in ("vision_config", "text_config"):
            if isinstance(values.get(name), dict):
                self[name] = RecordedKeys(values[name])

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self.read.add(key)
        return super().get(key, default)


def check_unread(values: RecordedKeys, where: Path) -> None:
    """Refuses unread keys that change results, and logs a warning for unknown ones.

    Raises:
      UserError: names key and value.
    """
    for section in values.values():
        if isinstance(section, RecordedKeys) and section.read:
            check_unread(section, where)
    unread = {key: value for key, value in values.items() if key not in values.read and value is not None}
    for key, value in unread.items():
        neutral = value is False or value in ([], {}) or (value in (0, 1) and value is not True)
        if (_CHANGING.fullmatch(key) and not neutral) or (key == "is_causal" and value is not True):
            raise UserError(f"{where}: {key}={value!r} is not supported; choose another model")
    code = unread.get("auto_map")
    if isinstance(code, dict) and any(key.startswith("AutoModel") for key in code):
        raise UserError(
            f"{where}: auto_map={code!r} runs the model's own code, which may differ from model_type="
            f"{values.get('model_type')!r}; remove auto_map if it does not"
        )
    known = (_HARMLESS, _CHANGING, re.compile("is_causal"))
    if unknown := [key for key in unread if not any(pattern.fullmatch(key) for pattern in known)]:
        logger.warning("%s: ignores unknown keys %s; check that they do not change results", where, unknown)


def quantisation(config: Mapping[str, Any]) -> tuple[str, str]:
    """Key and method of the quantisation that a config.json states; empty if none."""
    for key in ("quantization_config", "quantization", "compression_config"):
        if value := config.get(key):
            found = value if isinstance(value, dict) else {}
            method = found.get("quant_method")
            if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
                method = "bitsandbytes"
            elif method is None and key == "quantization":
                method = "MLX"
            bits = found.get("bits", found.get("w_bit"))
            words = [str(word)[:40] for word in (method, f"{bits} bits" if bits else None) if word]
            return key, ", ".join(word for word in words if word.isprintable()) or key
    inner = (config.get(name) for name in ("text_config", "vision_config", "llm_config"))
    found = (quantisation(part) for part in inner if isinstance(part, dict))
    return next((pair for pair in found if pair[0]), ("", ""))


def check_quantisation(values: Mapping[str, Any], tensors: Iterable[str], where: Path) -> None:
    """Refuses quantised weights, by config.json or by the names of tensors.

    Raises:
      UserError: names the method or a tensor.
    """
    key, method = quantisation(values)
    if key:
        raise UserError(f"{where}: {key}: the weights are quantised ({method}); {ORIGINAL}")
    if found := next((name for name in sorted(tensors) if _QUANTISED.fullmatch(name)), ""):
        raise UserError(f"{where}: the weights are quantised (tensor {found}); {ORIGINAL}")


def check_preprocessor(folder: Path, tower: Any) -> None:
    """Refuses image preprocessing that differs from ours for this tower.

    Args:
      folder: folder of the tower; transformers 4 writes preprocessor_config.json, 5 also
        processor_config.json.
      tower: section of the tower.

    Raises:
      UserError: names the key and its value.
    """
    expected = {
        "image_mean": tower.image_mean,
        "image_std": tower.image_std,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "do_normalize": True,
        "do_rescale": True,
    }
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = folder / name
        if not file.exists():
            continue
        values = read_config(file)
        values = subsection(values, "image_processor", file) if name.startswith("processor") else values
        wanted: dict[str, Any] = {
            **expected,
            **{key: False for key in values if key[:3] == "do_" and key not in _STEPS},
        }
        for key in ("size", "crop_size") if values.get("do_center_crop") else ("size",):
            sides = values.get(key)
            wanted[key] = (
                dict.fromkeys(sides, tower.image_size) if isinstance(sides, dict) else tower.image_size
            )
        for key, value in wanted.items():
            if values.get(key) is not None and not _close(values[key], value):
                raise UserError(
                    f"{file}: {key}={values[key]!r} is not supported, {value!r} was expected; choose another "
                    "model, or correct the file if the model was trained so"
                )


def _close(value: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        value, expected = list(value.values()), list(expected.values())
    try:
        return bool(np.allclose(np.asarray(value, np.float64), expected, rtol=1e-4, atol=1e-5))
    except (TypeError, ValueError):
        return False
