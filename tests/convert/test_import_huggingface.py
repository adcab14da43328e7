"""Hugging Face folders: every tensor fills its parameter, and a mismatch stops the import."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from foreign import LLAMA, SIGLIP, llama_weights, siglip_weights, write_folder

from tests.in_memory import fill
from vilam3_jax.convert.importer import check_rules, import_model, open_source
from vilam3_jax.data.tokenizer import load_tokenizer, train_bpe
from vilam3_jax.errors import UserError


def check_llama(params: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
    """Compares every parameter with its source tensor."""
    np.testing.assert_array_equal(params["llm/embed/embedding"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["llm/final_norm/scale"], weights["model.norm.weight"])
    for layer in range(LLAMA["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        for ours, theirs in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            np.testing.assert_array_equal(
                params[f"llm/layers/{ours}/scale"][layer], weights[f"{stem}{theirs}.weight"]
            )
        for group, theirs, names in (("attn", "self_attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down"))):
            for name in names:
                np.testing.assert_array_equal(
                    params[f"llm/layers/{group}/{name}/kernel"][layer],
                    weights[f"{stem}{theirs}.{name}_proj.weight"].T,
                )


@pytest.mark.parametrize("shards", [1, 3])
def test_llama(tmp_path, shards):
    weights = llama_weights()
    source = open_source(write_folder(tmp_path, LLAMA, weights, shards))
    params = fill(source)
    check_llama(params, weights)
    np.testing.assert_array_equal(params["llm/lm_head/kernel"], weights["lm_head.weight"].T)
    assert {path: value.shape for path, value in params.items()} == check_rules(source)
    assert source.parts[0].config["num_kv_heads"] == 2 and source.parts[0].config["head_dim"] == 8


def test_newer_folders_keep_theta_elsewhere(tmp_path):
    config = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    assert open_source(write_folder(tmp_path, config, llama_weights())).parts[0].config["rope_theta"] == 5e5


def test_bfloat16_is_read_and_written_bit_by_bit(tmp_path):
    weights = llama_weights()
    folder = write_folder(tmp_path, LLAMA, weights, shards=2, dtype=ml_dtypes.bfloat16)
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}
    source = open_source(folder)
    assert source.parts[0].dtypes == ("BF16",)
    check_llama(fill(source, ml_dtypes.bfloat16), rounded)
    check_llama(fill(source, np.float32), {name: v.astype(np.float32) for name, v in rounded.items()})


def test_tied_embeddings_have_no_head(tmp_path):
    config = {**LLAMA, "tie_word_embeddings": True}
    weights = llama_weights(tie_word_embeddings=True)
    assert "llm/lm_head/kernel" not in fill(open_source(write_folder(tmp_path / "a", config, weights)))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    source = open_source(write_folder(tmp_path / "b", config, weights))
    assert source.parts[0].unused == {"lm_head.weight": "equal to the embedding"}
    check_llama(fill(source), weights)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        open_source(write_folder(tmp_path / "c", config, weights))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_siglip(tmp_path, prefix):
    weights = siglip_weights(prefix)
    source = open_source(write_folder(tmp_path, SIGLIP, weights))
    params = fill(source)
    assert {path: value.shape for path, value in params.items()} == check_rules(source)
    get = {name.removeprefix(prefix): value for name, value in weights.items()}
    kernel = params["vision_tower/patch_embed/kernel"]
    assert kernel[1, 2, 0, 5] == get["embeddings.patch_embedding.weight"][5, 0, 1, 2]
    np.testing.assert_array_equal(
        params["vision_tower/pos_embed"], get["embeddings.position_embedding.weight"]
    )
    np.testing.assert_array_equal(params["vision_tower/head/probe"], get["head.probe"])
    for index, name in enumerate("qkv"):
        part = slice(24 * index, 24 * (index + 1))
        np.testing.assert_array_equal(
            params[f"vision_tower/head/attn/{name}/kernel"], get["head.attention.in_proj_weight"][part].T
        )
        np.testing.assert_array_equal(
            params[f"vision_tower/head/attn/{name}/bias"], get["head.attention.in_proj_bias"][part]
        )
    for layer in range(2):
        stem = f"encoder.layers.{layer}."
        for ours, theirs in (
            ("attn/o", "self_attn.out_proj"),
            ("attn/k", "self_attn.k_proj"),
            ("mlp/fc1", "mlp.fc1"),
        ):
            path = f"vision_tower/blocks/{ours}"
            np.testing.assert_array_equal(params[f"{path}/kernel"][layer], get[f"{stem}{theirs}.weight"].T)
            np.testing.assert_array_equal(params[f"{path}/bias"][layer], get[f"{stem}{theirs}.bias"])
        np.testing.assert_array_equal(
            params["vision_tower/blocks/norm2/scale"][layer], get[f"{stem}layer_norm2.weight"]
        )


def test_siglip_with_both_towers_lists_the_text_tower_as_unused(tmp_path):
    weights = siglip_weights()
    weights |= {"text_model.x.weight": np.ones(3, np.float32), "logit_bias": np.ones(1, np.float32)}
    config = {"model_type": "siglip", "vision_config": {**SIGLIP, "model_type": "siglip_vision_model"}}
    source = open_source(write_folder(tmp_path, config, weights), "hugging_face")
    assert set(source.parts[0].unused) == {"text_model.x.weight", "logit_bias"}
    assert len(fill(source)) == len(check_rules(source))


def test_a_siglip_without_its_head(tmp_path):
    weights = {name: value for name, value in siglip_weights().items() if ".head." not in name}
    source = open_source(write_folder(tmp_path, SIGLIP, weights))
    assert source.parts[0].config["head"] is False
    assert {path: value.shape for path, value in fill(source).items()} == check_rules(source)


def test_a_siglip_with_half_its_head_lists_what_stays_empty(tmp_path):
    weights = {name: value for name, value in siglip_weights().items() if "head.attention" not in name}
    with pytest.raises(
        UserError, match=r"not filled: vision_tower/head/attn/k/bias, .* tensors not used: none"
    ):
        fill(open_source(write_folder(tmp_path, SIGLIP, weights)))


def test_missing_and_unknown_tensors_are_both_listed(tmp_path):
    weights = llama_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    source = open_source(write_folder(tmp_path, LLAMA, weights))
    with pytest.raises(UserError) as caught:
        fill(source)
    message = str(caught.value)
    assert "not filled: llm/layers/mlp/up/kernel;" in message
    assert "missing: model.layers.1.mlp.up_proj.weight;" in message
    assert message.endswith("not used: model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported, only gemma3, gemma3_text, intern_vit_6b, llama, mistral, "
            "qwen2, qwen3, siglip, siglip_vision_model",
        ),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor is None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters=.*yarn"),
        ({"quantization_config": {"bits": 4}}, r"weights are quantised \(4 bits\)"),
        ({"hidden_size": None}, "hidden_size is None"),
    ],
)
def test_models_that_would_come_out_wrong_are_refused(tmp_path, change, message):
    folder = write_folder(tmp_path, {**LLAMA, **change}, llama_weights())
    with pytest.raises(UserError, match=message) as caught:
        open_source(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 60}, r"gate_proj\.weight is \(64, 32\), .* not give the \(32, 60\) of llm"),
        ({"num_hidden_layers": 2}, r"not used: model\.layers\.2"),
        ({"num_hidden_layers": 4}, r"missing: model\.layers\.3"),
        ({"num_key_value_heads": 4}, "of different models"),
    ],
)
def test_config_of_another_model_is_refused(tmp_path, change, message):
    source = open_source(write_folder(tmp_path, {**LLAMA, **change}, llama_weights()))
    with pytest.raises(UserError, match=message):
        fill(source)


def test_the_vocabulary_is_what_the_embedding_has_rows_for(tmp_path):
    weights = llama_weights(vocab_size=290)
    source = open_source(write_folder(tmp_path, LLAMA, weights))
    assert source.config["llm"]["vocab_size"] == 290
    found = fill(source)["llm/embed/embedding"]
    np.testing.assert_array_equal(found, weights["model.embed_tokens.weight"])


def test_added_tokens_without_a_row_are_left_out(tmp_path):
    corpus = ["There is a moderate left pleural effusion. The liver is 1125 ml. Heart size is normal."] * 20
    train_bpe(corpus, 288, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["added_tokens"] += [
        {**values["added_tokens"][-1], "id": 288 + extra, "content": f"<media{extra}>"} for extra in range(3)
    ]
    file.write_text(json.dumps(values))
    theirs = load_tokenizer(tmp_path / "tokenizer")
    assert theirs.vocab_size == 291
    source = write_folder(tmp_path / "theirs", LLAMA, llama_weights())
    import_model(source, tmp_path / "ours", tokenizer=tmp_path / "tokenizer")
    ours = load_tokenizer(tmp_path / "ours" / "tokenizer")
    text = "a word<media1>"
    assert max(theirs.encode(text, allow_special=True)) == 289
    assert max(ours.encode(text, allow_special=True)) < 288
    assert ours.decode(ours.encode(text)) == text
    assert ours.special_tokens == {
        word: index for word, index in theirs.special_tokens.items() if index < 288
    }
    smaller = write_folder(tmp_path / "smaller", LLAMA, llama_weights(vocab_size=280))
    with pytest.raises(UserError, match="has 291 tokens, the model only 280"):
        import_model(smaller, tmp_path / "none", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "none").exists()


def test_missing_shard_is_named(tmp_path):
    folder = write_folder(tmp_path, LLAMA, llama_weights(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard model-00002-of-00003\.safetensors is missing"):
        open_source(folder)


def test_truncated_shard_is_named(tmp_path):
    folder = write_folder(tmp_path, LLAMA, llama_weights(), shards=2)
    file = folder / "model-00001-of-00002.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors: truncated or damaged"):
            open_source(folder)


def test_index_that_does_not_fit_or_leaves_the_folder_is_refused(tmp_path):
    folder = write_folder(tmp_path, LLAMA, llama_weights(), shards=2)
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**where, "extra": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"index\.json: tensor 'extra' \(of 1\) is not in its shard"):
        open_source(folder)
    index.write_text(json.dumps({"weight_map": {**where, "extra": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="is outside the folder"):
        open_source(folder)


def test_pickled_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path, LLAMA, llama_weights())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has only pytorch_model\.bin"):
        open_source(folder)


def test_values_that_are_not_finite_are_refused(tmp_path):
    weights = llama_weights()
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = np.inf
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.down_proj\.weight holds values"):
        fill(open_source(write_folder(tmp_path, LLAMA, weights)))


def test_integer_tensors_are_refused(tmp_path):
    folder = write_folder(tmp_path, LLAMA, llama_weights(), dtype=np.int8)
    with pytest.raises(UserError, match="stored as I8, not as floating point"):
        fill(open_source(folder))


def test_a_folder_in_parts_names_them(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama"}')
    with pytest.raises(UserError, match=r"vision_tower: has no config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": ["llama"]},
        {"model_type": "granite"},
        {"model_type": {}},
        {"rope_parameters": [1]},
        {"rope_parameters": "x"},
        {"rope_scaling": "linear"},
        {"rope_scaling": [1]},
        {"rope_theta": 10**400},
        {"rope_theta": True},
        {"rms_norm_eps": -1},
        {"partial_rotary_factor": 0.5},
        {"sliding_window": 4096},
        {"vocab_size": "288"},
        {"hidden_size": None},
    ],
)
def test_settings_that_are_not_llamas(tmp_path, change):
    folder = write_folder(tmp_path, {**LLAMA, **change}, llama_weights())
    with pytest.raises(UserError, match=r"config\.json"):
        open_source(folder)
    with pytest.raises(UserError, match=r"config\.json"):
        open_source(folder, "hugging_face")


@pytest.mark.parametrize("value", ["abc", 5, [1]])
@pytest.mark.parametrize("key", ["vision_config", "text_config"])
def test_sections_that_are_no_objects(tmp_path, key, value):
    config = {"model_type": "siglip", "vision_config": SIGLIP, key: value}
    with pytest.raises(UserError, match=key):
        open_source(write_folder(tmp_path, config, siglip_weights()))


@pytest.mark.parametrize("name", [None, 3, [], "", "..", "x" * 300 + ".safetensors", "../model.safetensors"])
def test_an_index_that_names_what_is_no_file(tmp_path, name):
    folder = write_folder(tmp_path, LLAMA, llama_weights())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match=str(folder)):
        open_source(folder)


def test_deeply_nested_json(tmp_path):
    folder = write_folder(tmp_path, LLAMA, llama_weights())
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        open_source(folder)
