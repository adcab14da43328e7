"""Hugging Face folders (config.json and safetensors): Llama and Qwen decoders, SigLIP and InternViT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vilam3_jax.convert.safetensors_files import SafetensorsFolder, read_config, section
from vilam3_jax.convert.sources import (
    Checkpoint,
    Source,
    intern_vit_rules,
    layer_count,
    llama_rules,
    siglip_rules,
    siglip_text_rules,
    whole,
)
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import read_bytes

_DECODERS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What an InternViT may say of itself, and all of OpenGVLab's 6B do.
_INTERN_VIT = {"hidden_act": "gelu", "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}
_EQUAL_ROWS = 4096  # compared at a time
_MAX_LICENCE_BYTES = 1 << 20
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def open_llama(folder: Path) -> Source:
    """Opens a folder that transformers would load as Llama-, Qwen2- or Qwen3ForCausalLM.

    Raises:
      UserError: a setting that this package's Llama does not have, or broken files.
    """
    config_file = folder / "config.json"
    values = read_config(config_file)
    weights = SafetensorsFolder(folder)
    llm = llama_config(values, config_file)
    layer_count(llm["num_layers"], weights.shapes, f"{config_file}: num_hidden_layers")
    # The rows count: VILA grows vocabularies without always saying so (128,257 for Llama 3's 128,256).
    rows = weights.shapes.get("model.embed_tokens.weight", ())
    llm["vocab_size"] = rows[0] if len(rows) == 2 else llm["vocab_size"]
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    unused = {
        name: "recomputed from rope_theta" for name in weights.shapes if name.endswith("rotary_emb.inv_freq")
    }
    if llm["tie_embeddings"] and "lm_head.weight" in weights.shapes:
        if not _equal(weights, "lm_head.weight", "model.embed_tokens.weight"):
            raise UserError(
                f"{config_file}: says tie_word_embeddings, but lm_head.weight differs from the embedding; "
                "set tie_word_embeddings to false"
            )
        unused["lm_head.weight"] = "the same as the embedding"
    return Source(
        component="llm",
        config=llm,
        tensors=weights.shapes,
        rules=llama_rules(llm),
        reader=weights,
        files=[config_file, *weights.files],
        unused=unused,
        licence=licence(folder),
        dtypes=weights.dtypes,
        tokenizer=(lambda: load_tokenizer(folder)) if has_tokenizer else None,
    )


def _equal(weights: SafetensorsFolder, one: str, other: str) -> bool:
    if weights.shapes[one] != weights.shapes.get(other):
        return False
    rows = weights.shapes[one][0]
    starts = range(0, rows, _EQUAL_ROWS)
    ends = (min(start + _EQUAL_ROWS, rows) for start in starts)
    return all(
        np.array_equal(weights(one, start, end), weights(other, start, end))
        for start, end in zip(starts, ends, strict=True)
    )


def llama_config(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Translates a `config.json` of a Llama, Qwen2 or Qwen3 into our `llm` section (no LoRA).

    Args:
      values: the file's content.
      where: its path, for messages.

    Raises:
      UserError: a key is missing, or asks for what this package's Llama does not do.
    """
    family = values.get("model_type", "llama")
    if family not in tuple(_DECODERS):
        raise UserError(f"{where}: model_type {family!r} is not supported, only {', '.join(_DECODERS)}")
    rope = section(values, "rope_parameters", where)
    refused = {
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(values.get("mlp_bias")),
        "use_sliding_window": bool(values.get("use_sliding_window")),
        # Qwen2's files name a window that `use_sliding_window` leaves off.
        "sliding_window": family == "llama" and values.get("sliding_window") is not None,
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0) != 1.0,
        "quantization_config": values.get("quantization_config") is not None,
    }
    for key, wrong in refused.items():
        if wrong:
            raise UserError(f"{where}: {key}={values[key]!r} is not supported; choose another model")
    attention_bias = bool(values.get("attention_bias"))
    heads = _positive(values, "num_attention_heads", where)
    hidden = _positive(values, "hidden_size", where)
    return {
        "type": "llama",
        "vocab_size": _positive(values, "vocab_size", where),
        "hidden_size": hidden,
        "num_layers": _positive(values, "num_hidden_layers", where),
        "num_heads": heads,
        "num_kv_heads": _positive(values, "num_key_value_heads", where, heads),
        "head_dim": _positive(values, "head_dim", where, hidden // heads),
        "mlp_dim": _positive(values, "intermediate_size", where),
        "rope_theta": _number({**rope, **values}, "rope_theta", where, 10_000.0),
        "rope_scaling": _rope_scaling(section(values, "rope_scaling", where) or rope, where),
        "norm_eps": _number(values, "rms_norm_eps", where, 1e-6),
        "max_positions": _positive(values, "max_position_embeddings", where, 2048),
        # Qwen2 has the first always and says so nowhere.
        "qkv_bias": attention_bias or family == "qwen2",
        "o_bias": attention_bias and family != "qwen2",
        "qk_norm": family == "qwen3",
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "lora_rank": 0,
        "lora_alpha": 16.0,
        "lora_targets": (),
    }


def llama_folder_config(llm: Mapping[str, Any], tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
    """The `config.json` that says the same as our `llm` section; `llama_config` reads it back.

    Args:
      llm: our section.
      tokenizer: names the control tokens.
      dtype: of the weights.

    Raises:
      UserError: no architecture of Hugging Face's has this mixture of biases.
    """
    biases = bool(llm.get("qkv_bias")), bool(llm.get("o_bias"))
    family = "qwen3" if llm.get("qk_norm") else "qwen2" if biases == (True, False) else "llama"
    if biases[0] != biases[1] and family != "qwen2":
        raise UserError(
            f"model.llm: qkv_bias={biases[0]} with o_bias={biases[1]} and qk_norm={bool(llm.get('qk_norm'))} "
            "has no name among Hugging Face's models, so it cannot be exported"
        )
    config: dict[str, Any] = {
        "architectures": [_DECODERS[family]],
        "model_type": family,
        "vocab_size": llm["vocab_size"],
        "hidden_size": llm["hidden_size"],
        "num_hidden_layers": llm["num_layers"],
        "num_attention_heads": llm["num_heads"],
        "num_key_value_heads": llm["num_kv_heads"],
        "head_dim": llm["head_dim"],
        "intermediate_size": llm["mlp_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": llm["norm_eps"],
        "rope_theta": llm["rope_theta"],
        "max_position_embeddings": llm["max_positions"],
        # VILA's own keys.
        "model_max_length": llm["max_positions"],
        "tokenizer_model_max_length": llm["max_positions"],
        "tokenizer_padding_side": "right",
        "tie_word_embeddings": llm["tie_embeddings"],
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family != "qwen2":
        config["attention_bias"] = biases[0]
    if scaling := llm.get("rope_scaling"):
        theirs = dict(scaling)
        # transformers 4.37, which VILA-1.5 uses, knows 'linear' only, and only under the older name.
        if theirs["type"] != "linear":
            theirs["rope_type"] = theirs.pop("type")
        if "original_max_positions" in theirs:
            theirs["original_max_position_embeddings"] = theirs.pop("original_max_positions")
        config["rope_scaling"] = theirs
    if tokenizer is not None:
        config |= {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    return config


def _rope_scaling(values: Mapping[str, Any], where: Path) -> dict[str, Any] | None:
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope_scaling={dict(values)!r} is not supported; choose another model")
    at = f"{where}: rope_scaling"
    scaling: dict[str, Any] = {"type": kind, "factor": _number(values, "factor", at, 0.0)}
    if kind == "llama3":
        scaling["low_freq_factor"] = _number(values, "low_freq_factor", at, 0.0)
        scaling["high_freq_factor"] = _number(values, "high_freq_factor", at, 0.0)
        scaling["original_max_positions"] = _positive(values, "original_max_position_embeddings", at)
    return scaling


def open_siglip(folder: Path) -> Source:
    """Opens a SigLIP folder (the vision tower alone, or both towers) and takes the vision tower.

    Raises:
      UserError: a setting that this package's tower does not have, or broken files.
    """
    config_file = folder / "config.json"
    values = read_config(config_file)
    vision = section(values, "vision_config", config_file) or values
    if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(
            f"{config_file}: hidden_act={vision['hidden_act']!r} is not supported; choose another model"
        )
    if vision.get("num_channels", 3) != 3:
        raise UserError(f"{config_file}: num_channels={vision['num_channels']!r} is not supported, only 3 is")
    # Folders on the hub leave out what equals transformers' defaults, which are the base model's.
    weights = SafetensorsFolder(folder)
    layers = layer_count(
        vision.get("num_hidden_layers", 12), weights.shapes, f"{config_file}: num_hidden_layers"
    )
    first = "embeddings.patch_embedding.weight"
    prefixes = [name.removesuffix(first) for name in weights.shapes if name.endswith(first)]
    if len(prefixes) != 1:
        raise UserError(
            f"{folder}: {len(prefixes)} tensors end in {first}, one was expected; is it a SigLIP?"
        )
    # transformers pools by default; PaliGemma's towers, which NVILA has, lack the head.
    with_head = f"{prefixes[0]}head.probe" in weights.shapes
    outside = [name for name in weights.shapes if name.startswith(("text_model.", "logit_"))]
    return Source(
        component="vision_tower",
        config={
            "type": "siglip",
            "image_size": _positive(vision, "image_size", config_file, 224),
            "patch_size": _positive(vision, "patch_size", config_file, 16),
            "hidden_size": _positive(vision, "hidden_size", config_file, 768),
            "num_layers": layers,
            "num_heads": _positive(vision, "num_attention_heads", config_file, 12),
            "mlp_dim": _positive(vision, "intermediate_size", config_file, 3072),
            "norm_eps": _number(vision, "layer_norm_eps", config_file, 1e-6),
            "select_layer": -2,
            "head": with_head,
        },
        tensors=weights.shapes,
        rules=siglip_rules(layers, prefixes[0], with_head),
        reader=weights,
        files=[config_file, *weights.files],
        unused={
            **{name: "text tower and its logit scale: only the vision tower is imported" for name in outside},
            **{name: "0, 1, 2, ...: computed" for name in weights.shapes if name.endswith("position_ids")},
        },
        licence=licence(folder),
        dtypes=weights.dtypes,
    )


def open_siglip_pair(folder: Path) -> Checkpoint:
    """Opens a SigLIP folder with both towers, whole: the model of stage 1.

    Raises:
      UserError: a setting that this package's towers do not have, or broken files.
    """
    config_file = folder / "config.json"
    text = section(read_config(config_file), "text_config", config_file)
    if text.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(
            f"{config_file}: hidden_act={text['hidden_act']!r} is not supported; choose another model"
        )
    vision = open_siglip(folder)
    layers = layer_count(
        text.get("num_hidden_layers", 12), vision.tensors, f"{config_file}: text_config.num_hidden_layers"
    )
    rules = [*vision.rules, *siglip_text_rules(layers)]
    both = dataclasses.replace(
        vision,
        component="contrastive",
        rules=rules,
        unused={name: why for name, why in vision.unused.items() if name.endswith("position_ids")},
        tokenizer=(lambda: load_tokenizer(folder)) if (folder / "tokenizer.json").exists() else None,
    )
    config = {
        "image_size": vision.config["image_size"],
        "dtype": "bfloat16",
        "remat": "none",
        "vision_tower": vision.config,
        "text_tower": {
            "vocab_size": _positive(text, "vocab_size", config_file, 32_000),
            "max_length": _positive(text, "max_position_embeddings", config_file, 64),
            "hidden_size": _positive(text, "hidden_size", config_file, 768),
            "num_layers": layers,
            "num_heads": _positive(text, "num_attention_heads", config_file, 12),
            "mlp_dim": _positive(text, "intermediate_size", config_file, 3072),
            "norm_eps": _number(text, "layer_norm_eps", config_file, 1e-6),
            "logit_bias": -10.0,  # of a fresh model; the weights have their own
        },
    }
    return Checkpoint("contrastive", config, [both])


def siglip_pair_folder_config(model: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The `config.json` of a SigLIP with both towers; `open_siglip_pair` reads it back."""
    tower, text = model["vision_tower"], model["text_tower"]
    vision = siglip_folder_config(tower, dtype)
    del vision["architectures"]
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": vision,
        "text_config": {
            "model_type": "siglip_text_model",
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["max_length"],
            "hidden_size": text["hidden_size"],
            "num_hidden_layers": text["num_layers"],
            "num_attention_heads": text["num_heads"],
            "intermediate_size": text["mlp_dim"],
            "layer_norm_eps": text["norm_eps"],
            "hidden_act": "gelu_pytorch_tanh",
            "attention_dropout": 0.0,
            "projection_size": tower["hidden_size"],
            "torch_dtype": dtype,
        },
        "torch_dtype": dtype,
    }


def _vision_sizes(tower: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "image_size": tower["image_size"],
        "patch_size": tower["patch_size"],
        "num_channels": 3,
        "hidden_size": tower["hidden_size"],
        "num_hidden_layers": tower["num_layers"],
        "num_attention_heads": tower["num_heads"],
        "intermediate_size": tower["mlp_dim"],
        "layer_norm_eps": tower["norm_eps"],
        "torch_dtype": dtype,
    }


def siglip_folder_config(tower: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The `config.json` of a SigLIP vision tower; `open_siglip` reads it back."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **_vision_sizes(tower, dtype),
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "vision_use_head": tower["head"],
    }


def siglip_preprocessor(tower: Mapping[str, Any]) -> dict[str, Any]:
    """The `preprocessor_config.json` of a SigLIP: a square, then -1 to 1."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": tower["image_size"], "width": tower["image_size"]},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def open_intern_vit(folder: Path) -> Source:
    """Opens an InternViT folder as OpenGVLab releases it.

    Raises:
      UserError: a setting that this package's tower does not have, or broken files.
    """
    config_file = folder / "config.json"
    values = read_config(config_file)
    for key, value in _INTERN_VIT.items():
        if values.get(key, value) != value:
            raise UserError(f"{config_file}: {key}={values[key]!r} is not supported, only {value!r} is")
    weights = SafetensorsFolder(folder)
    layers = layer_count(values.get("num_hidden_layers"), weights.shapes, f"{config_file}: num_hidden_layers")
    return Source(
        component="vision_tower",
        config={
            "type": "intern_vit",
            "image_size": _positive(values, "image_size", config_file),
            "patch_size": _positive(values, "patch_size", config_file),
            "hidden_size": _positive(values, "hidden_size", config_file),
            "num_layers": layers,
            "num_heads": _positive(values, "num_attention_heads", config_file),
            "mlp_dim": _positive(values, "intermediate_size", config_file),
            "norm_eps": _number(values, "layer_norm_eps", config_file, 1e-6),
            "select_layer": -1,
        },
        tensors=weights.shapes,
        rules=intern_vit_rules(layers),
        reader=weights,
        files=[config_file, *weights.files],
        licence=licence(folder),
        dtypes=weights.dtypes,
    )


def intern_vit_folder_config(tower: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The `config.json` of an InternViT; `open_intern_vit` reads it back."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **_vision_sizes(tower, dtype),
        **_INTERN_VIT,
    }


def _positive(values: Mapping[str, Any], key: str, where: Path | str, default: int | None = None) -> int:
    value = values.get(key)
    return whole(default if value is None else value, f"{where}: {key}")


def _number(values: Mapping[str, Any], key: str, where: Path | str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise UserError(f"{where}: {key} is {value!r}, a positive number was expected; download it again")
    return float(value)


def licence(folder: Path) -> dict[str, str]:
    """Name and text of the licence file in a folder; empty where there is none."""
    for name in LICENCE_FILES:
        if (folder / name).is_file():
            text = read_bytes(folder / name, _MAX_LICENCE_BYTES).decode(errors="replace")
            return {"name": name, "text": text}
    return {}
