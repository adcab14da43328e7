"""Our Mistral against transformers' on random weights, with windows shorter than the rows."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.reference import decoder_parity, torch_weights
from vilam3_jax.convert import huggingface
from vilam3_jax.errors import UserError

LENGTH, WINDOW = 13, 4


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def pair(tmp_path, **changes):
    config = transformers.MistralConfig(
        **dict(
            vocab_size=decoder_parity.VOCAB,
            hidden_size=36,
            intermediate_size=50,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=WINDOW,
            attn_implementation="eager",
        )
        | changes
    )
    reference = torch_weights.randomise(transformers.MistralForCausalLM(config))
    return decoder_parity.imported(reference, tmp_path / "mistral")


def test_logits_and_packing(tmp_path):
    models = pair(tmp_path)
    assert models.config.type == "mistral" and models.config.sliding_window == WINDOW
    windowed = decoder_parity.check_logits(models, LENGTH, start=3990)
    decoder_parity.check_packing(models, (5, 8))
    models.reference.config.sliding_window = None
    ids = torch.from_numpy(decoder_parity.tokens(2, LENGTH))
    with torch.no_grad():
        full = models.reference(ids, position_ids=3990 + torch.arange(LENGTH)[None].repeat(2, 1)).logits
    assert np.abs(full.numpy() - windowed)[:, WINDOW:].max() > 0.1  # the window matters


@pytest.mark.parametrize("window", [1, LENGTH - 1, LENGTH, None])
def test_other_windows(tmp_path, window):
    models = pair(tmp_path, sliding_window=window)
    assert models.config.sliding_window == (window or 0)
    decoder_parity.check_logits(models, LENGTH)


def test_gradients(tmp_path):
    decoder_parity.check_gradients(pair(tmp_path), LENGTH)


def test_generation_with_a_cache(tmp_path):
    decoder_parity.check_cache(pair(tmp_path), LENGTH, prefill=6)


@pytest.mark.slow
def test_bfloat16(tmp_path):
    decoder_parity.check_bfloat16(pair(tmp_path, num_hidden_layers=6), 60)


def test_export(tmp_path):
    decoder_parity.check_export(pair(tmp_path), tmp_path)


def test_a_tied_head_and_linear_rope(tmp_path):
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500_000.0}
    models = pair(tmp_path, tie_word_embeddings=True, rope_parameters=rope)
    assert models.config.tie_embeddings and models.config.rope_theta == 500_000
    decoder_parity.check_logits(models, LENGTH)


BASE = dict(
    model_type="mistral",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.mark.parametrize(
    "keys", [{}, {"sliding_window": None}, {"sliding_window": 7}, {"rope_theta": 5e5}, {"head_dim": None}]
)
def test_config_json_is_read_as_transformers_reads_it(tmp_path, keys):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **keys}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = huggingface.llm_config({**BASE, **keys}, tmp_path / "config.json")
    assert ours["sliding_window"] == (theirs.sliding_window or 0)
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert ours["norm_eps"] == theirs.rms_norm_eps and ours["head_dim"] == theirs.head_dim
    assert ours["max_positions"] == theirs.max_position_embeddings


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        huggingface.llm_config({**BASE, **keys}, tmp_path / "config.json")
