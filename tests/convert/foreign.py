"""Small foreign checkpoints made from random numbers, written without torch."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}


def llama_weights(seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of a Llama with the sizes of `LLAMA`."""
    config = {**LLAMA, **changes}
    rng = np.random.default_rng(seed)
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        shapes |= {
            f"{stem}input_layernorm.weight": (width,),
            f"{stem}post_attention_layernorm.weight": (width,),
            f"{stem}self_attn.q_proj.weight": (width, width),
            f"{stem}self_attn.k_proj.weight": (kv, width),
            f"{stem}self_attn.v_proj.weight": (kv, width),
            f"{stem}self_attn.o_proj.weight": (width, width),
            f"{stem}mlp.gate_proj.weight": (mlp, width),
            f"{stem}mlp.up_proj.weight": (mlp, width),
            f"{stem}mlp.down_proj.weight": (width, mlp),
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def siglip_weights(prefix: str = "vision_model.", seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of a SigLIP vision tower with the sizes of `SIGLIP`."""
    rng = np.random.default_rng(seed)
    width, mlp = SIGLIP["hidden_size"], SIGLIP["intermediate_size"]
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, 4, 4),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (16, width),
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
    }
    dense = {"head.attention.out_proj": (width, width)}
    norms = ["post_layernorm", "head.layernorm"]
    stems = ["head."]
    for layer in range(SIGLIP["num_hidden_layers"]):
        stem = f"encoder.layers.{layer}."
        stems.append(stem)
        norms += [f"{stem}layer_norm1", f"{stem}layer_norm2"]
        dense |= {f"{stem}self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    for stem in stems:
        dense |= {f"{stem}mlp.fc1": (mlp, width), f"{stem}mlp.fc2": (width, mlp)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_folder(
    folder: Path, config: dict, weights: dict[str, np.ndarray], shards: int = 1, dtype=np.float32
) -> Path:
    """Writes a Hugging Face folder, with its tensors spread over `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[shard::shards]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def to_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders query and key rows as llama.cpp does, row by row."""
    head_dim = len(weight) // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for pair in range(head_dim // 2):
            for half in range(2):
                out[head * head_dim + 2 * pair + half] = weight[head * head_dim + half * head_dim // 2 + pair]
    return out


def byte_level_tokens() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a byte-level BPE of 288 tokens with SmolLM2's special cases."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["Ġ Ġ", "l i", "v e", "li ve", "live r", "Ġ liver", "i n", "e r"]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    tokens = special + pieces
    fill = [f"<unused{index}>" for index in range(LLAMA["vocab_size"] - len(tokens))]
    types = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * len(pieces)
    return tokens + fill, [*types, *([gguf.TokenType.CONTROL] * len(fill))], merges


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    extra: dict[str, str] | None = None,
    pre: str = "smollm",
    tokenizer: str = "gpt2",
    settings: dict[str, tuple[str, object]] | None = None,
) -> Path:
    """Writes a Llama (Hugging Face's names) as llama.cpp would."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
        **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    }
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(LLAMA["rms_norm_eps"])
    writer.add_rope_freq_base(LLAMA["rope_theta"])
    writer.add_vocab_size(LLAMA["vocab_size"])
    writer.add_license("apache-2.0")
    tokens, types, merges = byte_level_tokens()
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for key, (kind, setting) in (settings or {}).items():
        getattr(writer, f"add_{kind}")(key, setting)
    for name, value in weights.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, inner = stem.split(".", 3)
            stem = f"blk.{layer}.{names[inner]}"
        else:
            stem = names.get(stem, stem)
        if stem.endswith("attn_q"):
            value = to_llama_cpp(value, LLAMA["num_attention_heads"])
        if stem.endswith("attn_k"):
            value = to_llama_cpp(value, LLAMA["num_key_value_heads"])
        kind = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else quantisation
        writer.add_tensor(f"{stem}.weight", gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
