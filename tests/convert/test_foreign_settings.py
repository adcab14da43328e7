"""Settings and files beside the weights: read, harmless, named in a warning, or refused."""

from __future__ import annotations

import json
import logging

import ml_dtypes
import numpy as np
import pytest
from foreign import LLAMA, SIGLIP, llama_weights, siglip_weights, write_folder, write_gguf
from safetensors.numpy import save_file

from tests.in_memory import fill
from vilam3_jax.convert.importer import check_rules, open_source
from vilam3_jax.convert.safetensors_files import SafetensorsFolder
from vilam3_jax.errors import UserError
from vilam3_jax.models import families

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NEW, OLD = np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)


def write_shards(folder, first, second, where):
    save_file(first, folder / ONE)
    save_file(second, folder / TWO)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": NEW, "b": OLD}, {"b": NEW}),
        ({"a": NEW}, {"b": NEW, "a": OLD}),
        ({"a": NEW, "rotary_emb.inv_freq": OLD}, {"b": NEW}),
    ],
    ids=["old copy first", "old copy last", "buffer outside the index"],
)
def test_the_index_decides(tmp_path, first, second):
    write_shards(tmp_path, first, second, {"a": ONE, "b": TWO})
    weights = SafetensorsFolder(tmp_path)
    assert set(weights.shapes) == {"a", "b"}
    assert weights.unlisted == {*first, *second} - {"a", "b"}
    for name in "ab":
        np.testing.assert_array_equal(weights(name, 0, 2), NEW)


def test_a_tensor_missing_from_the_shard_that_the_index_names(tmp_path):
    write_shards(tmp_path, {"a": NEW, "b": NEW}, {"c": NEW}, {"a": ONE, "b": TWO, "c": TWO})
    with pytest.raises(UserError, match=r"index\.json: tensor 'b' \(of 1\) is not in its shard"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_under_two_prefixes(tmp_path):
    weights = siglip_weights()
    name = "vision_model.post_layernorm.weight"
    write_folder(tmp_path, SIGLIP, {**weights, name.removeprefix("vision_model."): weights[name]})
    with pytest.raises(UserError, match=r"holds '.*post_layernorm\.weight' \(of 1\) under two prefixes"):
        open_source(tmp_path)


def test_a_single_file_beside_an_index_of_others(tmp_path):
    write_shards(tmp_path, {"a": NEW}, {"b": NEW}, {"a": ONE, "b": TWO})
    save_file({"a": OLD, "b": OLD}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model\.safetensors and an .* of other files; remove one"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"logits_scaling": 8.0},
        {"embedding_multiplier": 12.0},
        {"num_local_experts": 8},
        {"is_causal": False},
        {"use_bidirectional_attention": True},
        {"final_logit_softcapping": 30.0},
        {"per_layer_config": {"0": {}}},
        {"auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        {"compression_config": {"format": "pack-quantized"}},
    ],
    ids=str,
)
def test_keys_that_change_results(tmp_path, change):
    folder = write_folder(tmp_path, LLAMA | change, llama_weights())
    with pytest.raises(UserError, match=r"config\.json: ") as caught:
        open_source(folder)
    (key,) = change
    assert ("quantization_config" if key == "text_config" else key) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 20, "num_beams": 1},
        {"_name_or_path": "x", "transformers_version": "5.0", "use_cache": True, "pretraining_tp": 1},
        {"attention_dropout": 0.1, "initializer_range": 0.02, "architectures": ["LlamaForCausalLM"]},
        {"bos_token_id": 1, "eos_token_id": [2, 3], "id2label": {"0": "a"}, "num_labels": 2},
        {"logits_scaling": 1.0, "num_experts": 0, "is_causal": True, "no_rope_layers": []},
        {"logits_scaling": None, "mystery": None, "mlp_bias": None, "hidden_act": None},
        {"quantization_config": None, "rope_scaling": None, "auto_map": {"AutoTokenizer": "x.Y"}},
        {"model_max_length": 4096, "tokenizer_padding_side": "right", "unsloth_version": "1"},
    ],
    ids=str,
)
def test_harmless_keys(tmp_path, caplog, change):
    plain = open_source(write_folder(tmp_path / "plain", LLAMA, llama_weights()))
    source = open_source(write_folder(tmp_path / "more", LLAMA | change, llama_weights()))
    assert source.config == plain.config and not caplog.records


def test_unknown_keys_and_files_are_named(tmp_path, caplog):
    folder = write_folder(tmp_path, LLAMA | {"mystery_gain": 3, "other": "x"}, llama_weights())
    for name in ("README.md", "generation_config.json", "LICENSE", "merges.txt", "modeling_x.py"):
        (folder / name).write_text("{}")
    (folder / "steering_vectors.npy").write_bytes(b"x")
    save_file({"a": NEW}, folder / "more.safetensors")
    with caplog.at_level(logging.WARNING):
        check_rules(open_source(folder))
    (files, keys) = (record.getMessage() for record in caplog.records)
    assert f"{folder}: ignores more.safetensors, steering_vectors.npy;" in files
    assert f"{folder / 'config.json'}: ignores unknown keys ['mystery_gain', 'other'];" in keys


def test_keys_inside_the_towers_sections(tmp_path, caplog):
    vision = {**SIGLIP, "model_type": "siglip_vision_model", "mystery": 1}
    config = {"model_type": "siglip", "vision_config": vision, "text_config": {"unread": 1}}
    open_source(write_folder(tmp_path, config, siglip_weights()), "hugging_face")
    assert [record.getMessage().count("['mystery']") for record in caplog.records] == [1]
    vision["num_experts"] = 4
    write_folder(tmp_path, config, siglip_weights())
    with pytest.raises(UserError, match="num_experts=4"):
        open_source(tmp_path, "hugging_face")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight_scale",
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "model.layers.0.mlp.up_proj.scale_weight",
        "model.layers.0.mlp.up_proj.qweight",
        "model.layers.0.mlp.up_proj.scales",
        "model.layers.0.mlp.up_proj.weight.absmax",
        "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
        "model.layers.0.mlp.up_proj.SCB",
        "scaled_fp8",
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_tensors_of_quantisers(tmp_path, name, listed):
    weights = llama_weights()
    folder = write_folder(tmp_path, LLAMA, weights, dtype=ml_dtypes.float8_e4m3fn)
    tensors = {key: value.astype(ml_dtypes.float8_e4m3fn) for key, value in weights.items()}
    save_file({**tensors, name: np.ones(1, np.float32)}, folder / "model.safetensors")
    names = [*weights, name] if listed else weights
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"weights are quantised \(tensor {name}\)"):
        open_source(folder)


def test_float8_without_scales_is_read(tmp_path):
    weights = llama_weights()
    folder = write_folder(tmp_path, LLAMA, weights, dtype=ml_dtypes.float8_e4m3fn)
    found = fill(open_source(folder))["llm/final_norm/scale"]
    expected = weights["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


PREPROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 0.00392156862745098,
    "resample": 3,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_convert_rgb": None,
    "size": {"height": 16, "width": 16},
    "image_processor_type": "SiglipImageProcessor",
}


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": 16},
        {"size": [16, 16]},
        {"image_mean": 0.5},
        {"image_mean": None, "resample": None, "size": None},
        {"do_center_crop": True, "crop_size": 16},
        {"do_center_crop": False, "crop_size": 12},
        {"do_pad": False},
        pytest.param({"image_mean": [0.485, 0.456, 0.406]}, id="refused mean"),
        pytest.param({"image_std": [0.229, 0.224, 0.225]}, id="refused std"),
        pytest.param({"image_mean": [0.0, 0.0, 0.0]}, id="refused zero"),
        pytest.param({"image_mean": "half"}, id="refused text"),
        pytest.param({"rescale_factor": 1 / 127.5}, id="refused factor"),
        pytest.param({"do_normalize": False}, id="refused normalize"),
        pytest.param({"do_rescale": False}, id="refused rescale"),
        pytest.param({"resample": 2}, id="refused bilinear"),
        pytest.param({"size": {"height": 32, "width": 32}}, id="refused size"),
        pytest.param({"size": [16, 32]}, id="refused sides"),
        pytest.param({"do_center_crop": True, "crop_size": 12}, id="refused crop"),
        pytest.param({"do_pad": True}, id="refused pad"),
        pytest.param({"do_flip_channel_order": True}, id="refused order"),
    ],
    ids=str,
)
def test_preprocessing_of_a_tower(tmp_path, request, file, change):
    folder = write_folder(tmp_path, SIGLIP, siglip_weights())
    values = PREPROCESSOR | change
    values = {"image_processor": values} if file.startswith("processor") else values
    (folder / file).write_text(json.dumps(values))
    if "refused" not in request.node.callspec.id:
        assert open_source(folder).kind == "vision_tower"
        return
    key = [*change][-1]
    with pytest.raises(UserError, match=rf"{file}: {key}=.* is not supported, .* was expected"):
        open_source(folder)


def test_statistics_of_each_tower():
    sizes = dict(image_size=16, patch_size=4, hidden_size=8, num_layers=2, num_heads=1, mlp_dim=8)
    for name, mean, colour in (
        ("siglip", (0.5, 0.5, 0.5), (127, 127, 127)),
        ("intern_vit", (0.485, 0.456, 0.406), (123, 116, 103)),
    ):
        tower = families.config_of("vision_tower", {"type": name, **sizes})
        assert tower.image_mean == mean and tower.background == colour


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("uint32", "llama.expert_count", 8),
        ("uint32", "llama.attention.sliding_window", 4096),
        ("float32", "llama.logit_scale", 0.5),
        ("float32", "llama.rope.scaling.factor", 4.0),
        ("bool", "llama.attention.causal", False),
        ("uint32", "llama.attention.value_length", 4),
        ("string", "llama.something_new", "x"),
    ],
)
def test_gguf_settings_that_change_results(tmp_path, kind, key, value):
    file = write_gguf(tmp_path / "m.gguf", llama_weights(), settings={key: (kind, value)})
    with pytest.raises(UserError, match=rf"m\.gguf: {key}=.* is not supported"):
        open_source(file)


def test_neutral_gguf_settings(tmp_path):
    neutral = {
        "llama.expert_count": ("uint32", 0),
        "llama.attention.causal": ("bool", True),
        "llama.attention.value_length": ("uint32", 8),
        "llama.rope.scaling.factor": ("float32", 1.0),
        "general.quantization_version": ("uint32", 2),
        "quantize.imatrix.file": ("string", "x"),
    }
    assert open_source(write_gguf(tmp_path / "m.gguf", llama_weights(), settings=neutral)).kind == "llm"
