"""Reading of config.json: equal to transformers' config classes, or refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vilam3_jax.convert.huggingface import llm_config, llm_folder_config
from vilam3_jax.errors import UserError
from vilam3_jax.models import families
from vilam3_jax.models.decoder import rope_frequencies

SIZES = dict(
    vocab_size=80,
    hidden_size=256,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=32,
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}


# Refused for a Mistral, here or by transformers.
ONLY_LLAMA_AND_QWEN = (
    {"num_key_value_heads": None},
    {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    {"rope_scaling": LLAMA3},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
)


def frequencies(config):
    """transformers' rotary frequencies."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2).float() / head_dim
        return 1 / config.rope_parameters["rope_theta"] ** exponents
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}, "rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 512}},
        {"rope_scaling": LLAMA3, "max_position_embeddings": 4096},
        {"rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 4},
        {"head_dim": 12},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 99},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        {"use_sliding_window": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_same_reading(tmp_path, family, changes):
    values = {"model_type": family, **SIZES, **changes}
    if family == "mistral" and changes in ONLY_LLAMA_AND_QWEN:
        with pytest.raises((UserError, StrictDataclassError)):
            llm_config(values, tmp_path / "config.json")
            transformers.MistralConfig(**values)
        return
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = llm_config(values, tmp_path / "config.json")
    assert {key: ours[key] for key in NAMES} == {key: getattr(theirs, name) for key, name in NAMES.items()}
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours["head_dim"] == head_dim
    got = rope_frequencies(head_dim, ours["rope_theta"], ours["rope_scaling"])
    torch.testing.assert_close(torch.from_numpy(got), frequencies(theirs), rtol=1e-6, atol=0)
    if family == "mistral":
        assert ours["sliding_window"] == (theirs.sliding_window or 0)
    # transformers reads our export as the same model.
    section = families.config_of("llm", ours)
    (tmp_path / "config.json").write_text(json.dumps(llm_folder_config(section, None, "bfloat16")))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in NAMES.values()} == {
        name: getattr(theirs, name) for name in NAMES.values()
    }
    torch.testing.assert_close(frequencies(again), frequencies(theirs), rtol=0, atol=0)
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 5e5}},
            "rope_scaling and rope_parameters contradict each other",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": LLAMA3,
            },
            "rope_scaling and rope_parameters contradict each other",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {}}},
            "rope_parameters=.* depends on the layer type",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling=.*dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters=.*longrope"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 5e5, "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": "500000"}, "rope_theta is '500000'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"attention_bias": "no"}, "attention_bias is 'no'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_key_value_heads": 5}, r"config\.json: .*num_kv_heads=5"),
    ],
    ids=str,
)
def test_refused(tmp_path, changes, message):
    values = {"model_type": "llama", **SIZES, **changes}
    with pytest.raises(UserError, match=message):
        llm_config(values, tmp_path / "config.json")


def test_the_outer_theta_is_named(tmp_path, caplog):
    values = {"model_type": "llama", **SIZES, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}
    llm_config(values, tmp_path / "config.json")
    assert "rope_theta=10000.0 contradicts rope_theta=500000.0 in rope_parameters" in caplog.text
