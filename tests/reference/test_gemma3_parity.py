"""Our Gemma 3 text model against transformers' on random weights, with windows shorter than the rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.in_memory import fill
from tests.reference import decoder_parity, torch_weights
from vilam3_jax.convert import huggingface, importer
from vilam3_jax.errors import UserError

LENGTH, WINDOW = 13, 4
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def pair(tmp_path, layers=8, **changes):
    config = transformers.Gemma3TextConfig(
        **dict(
            vocab_size=decoder_parity.VOCAB,
            hidden_size=36,
            intermediate_size=50,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=13,
            sliding_window=WINDOW,
            pad_token_id=None,  # torch gives the embedding of padding no gradient
            attn_implementation="eager",
        )
        | changes
    )
    model = transformers.Gemma3ForCausalLM(config)
    reference = torch_weights.randomise(model)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name:
                parameter -= 1  # scales are stored as their distance from 1
    return decoder_parity.imported(reference, tmp_path / "gemma3")


def test_logits_and_packing(tmp_path):
    models = pair(tmp_path)  # one whole period of six layers, and two more
    assert models.config.windows == (*(WINDOW,) * 5, None, WINDOW, WINDOW)
    assert models.config.tie_embeddings and models.config.query_scale == 13
    decoder_parity.check_logits(models, LENGTH, start=3990)
    decoder_parity.check_packing(models, (5, 8))


@pytest.mark.parametrize(
    "types", [(FULL, SLIDING, FULL), (SLIDING, FULL, FULL, SLIDING, SLIDING), (FULL, FULL), (SLIDING,)]
)
def test_other_patterns_of_layers(tmp_path, types):
    models = pair(tmp_path, layers=len(types), layer_types=list(types))
    decoder_parity.check_logits(models, LENGTH)


def test_gradients(tmp_path):
    decoder_parity.check_gradients(pair(tmp_path, layers=6), LENGTH)


def test_generation_with_a_cache(tmp_path):
    decoder_parity.check_cache(pair(tmp_path), LENGTH, prefill=6)


@pytest.mark.slow
def test_bfloat16(tmp_path):
    decoder_parity.check_bfloat16(pair(tmp_path), 60)


@pytest.mark.parametrize("tied", [True, False])
def test_export(tmp_path, tied):
    rope = {
        SLIDING: {"rope_type": "default", "rope_theta": 20_000.0},
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
    }
    models = pair(tmp_path, tie_word_embeddings=tied, rope_parameters=rope)
    assert models.config.rope_scaling == {"type": "linear", "factor": 8.0}
    assert models.config.local_rope_theta == 20_000 and models.config.local_rope_scaling is None
    decoder_parity.check_logits(models, LENGTH)
    decoder_parity.check_export(models, tmp_path)


def test_image_tokens_enter_unscaled_and_the_head_uses_the_unscaled_table(tmp_path):
    models = pair(tmp_path, layers=1)
    model, table = models.model(models.params), models.params["embed"]["embedding"]
    np.testing.assert_allclose(model.embed(jnp.asarray([[3]]))[0, 0], table[3] * 6.0, rtol=1e-6)
    np.testing.assert_array_equal(model.head_kernel(), table.T)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_names_of_the_multimodal_model(tmp_path, prefix):
    models = pair(tmp_path, layers=2)
    file = models.folder / "model.safetensors"
    tensors = {name.replace("model.", prefix, 1): value for name, value in load_file(file).items()}
    save_file(tensors, file)
    again = fill(importer.open_source(models.folder))
    np.testing.assert_array_equal(again["llm/embed/embedding"], models.params["embed"]["embedding"])


BASE = dict(
    model_type="gemma3_text",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=7,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sliding_window_pattern": 3},
        {"layer_types": [SLIDING, FULL] * 3 + [FULL]},
        {"rope_theta": 5e5, "rope_local_base_freq": 7e3},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6},
        {"tie_word_embeddings": False, "query_pre_attn_scalar": 168},
        {"attn_logit_softcapping": 50.0},
    ],
)
def test_config_json_is_read_as_transformers_reads_it(tmp_path, keys):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **keys}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = huggingface.llm_config({**BASE, **keys}, tmp_path / "config.json")
    assert list(ours["layer_types"]) == theirs.layer_types
    full, local = theirs.rope_parameters[FULL], theirs.rope_parameters[SLIDING]
    assert (ours["rope_theta"], ours["local_rope_theta"]) == (full["rope_theta"], local["rope_theta"])
    scaling = ours["rope_scaling"] or {"type": "default"}
    assert scaling["type"] == full["rope_type"] and scaling.get("factor") == full.get("factor")
    assert local["rope_type"] == "default" and ours["local_rope_scaling"] is None
    assert ours["query_scale"] == theirs.query_pre_attn_scalar
    assert ours["tie_embeddings"] == theirs.tie_word_embeddings
    assert ours["sliding_window"] == theirs.sliding_window


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "names neither"),
        ({"model_type": "gemma3"}, "vision tower"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        huggingface.llm_config({**BASE, **keys}, tmp_path / "config.json")
