"""Exports to Hugging Face's layouts: round trips are exact to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign import LLAMA, SIGLIP, llama_weights, siglip_weights, write_folder
from safetensors import safe_open
from safetensors.numpy import load_file
from vilam3_jax.configs.models import tiny

from vilam3_jax import cli
from vilam3_jax.checkpoints import exports
from vilam3_jax.config import ConfigDict
from vilam3_jax.convert.exporter import export_folder
from vilam3_jax.convert.importer import import_model
from vilam3_jax.convert.vila import vila_folder_config
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.text_rules import TextRules
from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.errors import UserError
from vilam3_jax.models import build, model_config, param_paths

INTERN_VIT = dict(
    model_type="intern_vit_6b",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=16,
    patch_size=4,
)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    """Path → content of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def intern_vit_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.class_embedding": (1, 1, 24),
        "embeddings.position_embedding": (1, 17, 24),
        "embeddings.patch_embedding.weight": (24, 3, 4, 4),
        "embeddings.patch_embedding.bias": (24,),
    }
    for layer in range(2):
        stem = f"encoder.layers.{layer}."
        shapes |= {stem + name: (24,) for name in ("ls1", "ls2", "norm1.weight", "norm2.weight")}
        shapes |= {stem + name: (24,) for name in ("attn.q_norm.weight", "attn.k_norm.weight")}
        shapes |= {f"{stem}attn.qkv.weight": (72, 24), f"{stem}attn.proj.weight": (24, 24)}
        shapes |= {
            f"{stem}attn.proj.bias": (24,),
            f"{stem}mlp.fc1.weight": (40, 24),
            f"{stem}mlp.fc1.bias": (40,),
        }
        shapes |= {f"{stem}mlp.fc2.weight": (24, 40), f"{stem}mlp.fc2.bias": (24,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("leaf_bytes", [4_000_000_000, 9_000])
@pytest.mark.parametrize(
    "config, weights",
    [
        (LLAMA, llama_weights()),
        ({**LLAMA, "tie_word_embeddings": True}, llama_weights(tie_word_embeddings=True)),
        (SIGLIP, siglip_weights()),
        (SIGLIP, {name: value for name, value in siglip_weights().items() if ".head." not in name}),
        (INTERN_VIT, intern_vit_weights()),
    ],
    ids=["llama", "tied", "siglip", "headless", "intern_vit"],
)
def test_what_was_imported_is_exported_again(tmp_path, monkeypatch, config, weights, leaf_bytes):
    monkeypatch.setattr(exports, "LEAF_BYTES", leaf_bytes)
    folder = write_folder(tmp_path / "theirs", config, weights, shards=2)
    import_model(folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back", file_bytes=20_000)
    found = tensors(tmp_path / "back")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value)
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: said[key] for key in config if key != "architectures"} == {
        key: value for key, value in config.items() if key != "architectures"
    }
    # A second round trip gives identical bytes.
    import_model(tmp_path / "back", tmp_path / "ours2")
    export_folder(tmp_path / "ours2", tmp_path / "back2", file_bytes=20_000)
    assert files(tmp_path / "back") == files(tmp_path / "back2")


def tiny_export(folder: Path, **llm: object) -> tuple[ConfigDict, dict[str, jax.Array]]:
    """A whole model of random weights, as a run would export it."""
    config = ConfigDict(tiny.get_model().to_dict())
    config.llm.update(vocab_size=300, **llm)
    params = param_paths.flatten(build.init_params(config, "generative", jax.random.key(0)))
    noise = np.random.default_rng(0)
    params = {
        path: value + noise.normal(size=value.shape).astype(np.float32) for path, value in params.items()
    }
    params = {path: value.astype(config.param_dtype) for path, value in params.items()}
    train_bpe(["liver spleen"], 270, folder.parent / "words", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    exports.export_model(
        folder, params, {**config.to_dict(), "kind": "generative"}, folder.parent / "words", {"run": "test"}
    )
    return config, params


@pytest.mark.parametrize("order, leaf_bytes", [("row", 4_000_000_000), ("column", 9_000)])
def test_a_whole_model_there_and_back(tmp_path, monkeypatch, capsys, order, leaf_bytes):
    monkeypatch.setattr(exports, "LEAF_BYTES", leaf_bytes)
    _, params = tiny_export(tmp_path / "ours")
    model = json.loads((tmp_path / "ours" / "model.json").read_text())
    model["projector"]["token_order"] = order
    (tmp_path / "ours" / "model.json").write_text(json.dumps(model))
    for step in ("1", "2"):
        source = "ours" if step == "1" else "again1"
        arguments = ["--source", str(tmp_path / source), "--out", str(tmp_path / f"vila{step}")]
        assert cli.main(["convert", "export", *arguments]) == 0
        assert "vision_tower, mm_projector, llm" in capsys.readouterr().out
        arguments = ["--source", str(tmp_path / f"vila{step}"), "--out", str(tmp_path / f"again{step}")]
        assert cli.main(["convert", "import", *arguments]) == 0
    assert files(tmp_path / "vila1") == files(tmp_path / "vila2")
    again, config, tokenizer = exports.load_export(tmp_path / "again1")
    assert config.template == "chatml" and config.projector.token_order == order
    assert TextRules.of(config.text) == TextRules()
    assert (tokenizer / "tokenizer.json").exists()
    for path, value in param_paths.flatten(again).items():
        np.testing.assert_array_equal(value, params[path], err_msg=path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(image_aspect_ratio="pad"),
        dict(s2_scales=(32, 64)),
        dict(image_aspect_ratio="pad", s2_scales=(32, 64)),
        dict(image_aspect_ratio="dynamic", max_tiles=6),
        dict(image_aspect_ratio="dynamic_s2", s2_scales=(32, 64, 96), max_tiles=10),
    ],
)
def test_ways_to_take_images_come_back(tmp_path, changes):
    config = ConfigDict({**tiny.get_model().to_dict(), **changes})
    params = param_paths.flatten(build.init_params(config, "generative", jax.random.key(0)))
    train_bpe(["liver spleen"], 270, tmp_path / "words", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    model = {**config.to_dict(), "kind": "generative"}
    exports.export_model(tmp_path / "ours", params, model, tmp_path / "words", {})
    export_folder(tmp_path / "ours", tmp_path / "vila")
    import_model(tmp_path / "vila", tmp_path / "again")
    again = exports.load_model_config(tmp_path / "again")
    assert {key: getattr(again, key) for key in changes} == changes
    assert again.image_layout == model_config.resolve(config).image_layout


def test_loras_are_merged(tmp_path):
    ranked = dict(lora_rank=3, lora_alpha=6.0, lora_targets=("q", "down"))
    config, params = tiny_export(tmp_path / "ours", **ranked)
    summary = export_folder(tmp_path / "ours", tmp_path / "vila")
    assert summary.merged == 2
    assert not any("lora" in name for name in tensors(tmp_path / "vila" / "llm"))
    import_model(tmp_path / "vila", tmp_path / "again")
    again, merged_config, _ = exports.load_export(tmp_path / "again")
    tokens = jnp.arange(8)[None]
    batch = PackedBatch(tokens, jnp.ones_like(tokens), tokens, None, None, None, None)
    outputs = []
    for settings, tree in (
        (model_config.resolve(config), param_paths.unflatten(params)),
        (merged_config, again),
    ):
        settings = settings.replace(dtype="float32")
        model = build.merge(build.abstract_model(settings, "generative")[0], tree)
        with jax.default_matmul_precision("highest"):
            outputs.append(np.asarray(model(batch)))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_tokenizer_files_and_licence_go_along(tmp_path):
    folder = write_folder(tmp_path / "theirs", LLAMA, llama_weights())
    train_bpe(["liver spleen"], 270, folder, ("<s>", "</s>", "<pad>"))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "special_tokens_map.json").write_text('{"unk_token": "<s>"}')
    (folder / "LICENSE").write_text("theirs")
    import_model(folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    for name in ("tokenizer.model", "special_tokens_map.json", "LICENSE", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def test_what_vila_reads_of_a_root(tmp_path):
    """Keys that select the tower in NVILA's loader, with the values of NVILA-8B."""
    config = ConfigDict({**tiny.get_model().to_dict(), "image_aspect_ratio": "dynamic_s2"})
    config.update(s2_scales=(32, 64, 96), max_tiles=12)
    model = model_config.resolve(config)
    root = vila_folder_config(model, "bfloat16", {"llm": {}, "vision_tower": {}, "mm_projector": {}})
    wanted = dict(dynamic_s2=True, s2=False, s2_scales="32,64,96", s2_resize_output_to_scale_idx=-1)
    assert {key: root[key] for key in wanted} == wanted
    assert root["mm_hidden_size"] == 3 * config.vision_tower.hidden_size


@pytest.mark.parametrize(
    "model, message",
    [
        ([1], "does not state the kind of model"),
        ({}, "does not state the kind of model"),
        ({"kind": "llm", "llm": 3, "param_dtype": "float32"}, "no llm"),
        ({"kind": "llm", "llm": {}, "param_dtype": "float16"}, "param_dtype='float16'"),
        ({"kind": "story", "param_dtype": "float32"}, "kind 'story' is unknown"),
    ],
)
def test_damaged_exports(tmp_path, capsys, model, message):
    (tmp_path / "ours" / "params").mkdir(parents=True)
    (tmp_path / "ours" / "model.json").write_text(json.dumps(model))
    assert (
        cli.main(["convert", "export", "--source", str(tmp_path / "ours"), "--out", str(tmp_path / "out")])
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_dtypes(tmp_path):
    folder = write_folder(tmp_path / "theirs", LLAMA, llama_weights(), dtype=ml_dtypes.bfloat16)
    summary = import_model(folder, tmp_path / "ours")
    assert summary.dtype == "bfloat16"
    assert export_folder(tmp_path / "ours", tmp_path / "back").dtype == "bfloat16"
    with safe_open(tmp_path / "back" / "model.safetensors", "numpy") as file:
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16" and file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    export_folder(tmp_path / "ours", tmp_path / "wide", dtype="float32")
    theirs = {name: value.astype(ml_dtypes.bfloat16) for name, value in llama_weights().items()}
    for name, value in tensors(tmp_path / "wide").items():
        np.testing.assert_array_equal(value, theirs[name].astype(np.float32))


def test_bad_requests_leave_nothing(tmp_path, capsys):
    tiny_export(tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for source, out, message in (
        ("absent", "out", "model.json is missing"),
        ("ours", "full", "already exists"),
        ("ours", "gs://bucket/x", "local disk"),
    ):
        target = out if "://" in out else str(tmp_path / out)
        assert cli.main(["convert", "export", "--source", str(tmp_path / source), "--out", target]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    model = json.loads((tmp_path / "ours" / "model.json").read_text())
    (tmp_path / "ours" / "model.json").write_text(json.dumps({**model, "kind": "llm"}))
    with pytest.raises(UserError, match=r"not exported: .'projector/"):
        export_folder(tmp_path / "ours", tmp_path / "out")
    model["llm"]["o_bias"] = True
    (tmp_path / "ours" / "model.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match="o_bias=True"):
        export_folder(tmp_path / "ours", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "ours", "words"]
