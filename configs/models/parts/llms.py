"""Language models: `model.llm`. Sizes are those of the checkpoints' own `config.json`."""

from typing import Any

from ml_collections import ConfigDict

from vilam3_jax.models.llama import LlamaConfig

_LLAMA3: dict[str, Any] = dict(num_heads=32, num_kv_heads=8, mlp_dim=14_336, rope_theta=500_000.0)
_QWEN: dict[str, Any] = dict(rope_theta=1_000_000.0, norm_eps=1e-6)


def sheared_llama_2_7b() -> ConfigDict:
    """princeton-nlp/Sheared-LLaMA-2.7B: VILA-M3 3B."""
    return llama(32_000, 2560, 32, num_heads=20, num_kv_heads=20, mlp_dim=6912, max_positions=4096)


def llama3_8b() -> ConfigDict:
    """meta-llama/Meta-Llama-3-8B-Instruct with VILA's one added token, [PAD]: VILA-M3 8B."""
    return llama(128_257, 4096, 32, max_positions=8192, **_LLAMA3)


def llama3_1_8b() -> ConfigDict:
    """meta-llama/Llama-3.1-8B-Instruct: Llama 3 with rotary frequencies stretched to 131,072 positions."""
    llm = llama(128_256, 4096, 32, max_positions=131_072, **_LLAMA3)
    llm.rope_scaling = ConfigDict(
        dict(
            type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        )
    )
    return llm


def vicuna_13b() -> ConfigDict:
    """lmsys/vicuna-13b-v1.5: VILA-M3 13B."""
    return llama(32_000, 5120, 40, num_heads=40, num_kv_heads=40, mlp_dim=13_824, max_positions=4096)


def yi_34b() -> ConfigDict:
    """NousResearch/Nous-Hermes-2-Yi-34B: VILA-1.5 40B."""
    sizes: dict[str, Any] = dict(num_heads=56, num_kv_heads=8, mlp_dim=20_480, max_positions=4096)
    return llama(64_000, 7168, 60, rope_theta=5_000_000.0, **sizes)


def qwen2_5_7b() -> ConfigDict:
    """Qwen/Qwen2.5-7B-Instruct."""
    sizes: dict[str, Any] = dict(num_heads=28, num_kv_heads=4, mlp_dim=18_944, max_positions=32_768)
    return llama(152_064, 3584, 28, qkv_bias=True, **sizes, **_QWEN)


def qwen2_5_1_5b() -> ConfigDict:
    """Qwen/Qwen2.5-1.5B-Instruct."""
    sizes: dict[str, Any] = dict(num_heads=12, num_kv_heads=2, mlp_dim=8960, tie_embeddings=True)
    return llama(151_936, 1536, 28, qkv_bias=True, max_positions=32_768, **sizes, **_QWEN)


def qwen3_8b() -> ConfigDict:
    """Qwen/Qwen3-8B."""
    sizes: dict[str, Any] = dict(num_heads=32, num_kv_heads=8, mlp_dim=12_288, max_positions=40_960)
    return llama(151_936, 4096, 36, qk_norm=True, **sizes, **_QWEN)


def llama(vocab_size: int, hidden_size: int, num_layers: int, **changes: Any) -> ConfigDict:
    """An `llm` section with all its keys: a Llama with heads of 128, unless changed.

    `max_positions` is the context length that the weights were trained for.
    """
    values = dict(vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, head_dim=128)
    defaults = dict(norm_eps=1e-5)
    return ConfigDict(LlamaConfig(type="llama", **{**values, **defaults, **changes}).to_dict())


LLMS = {
    part.__name__: part
    for part in (
        sheared_llama_2_7b,
        llama3_8b,
        llama3_1_8b,
        vicuna_13b,
        yi_34b,
        qwen2_5_7b,
        qwen2_5_1_5b,
        qwen3_8b,
    )
}
