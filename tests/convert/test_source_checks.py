"""Common wrong sources for `vilam3 convert import`: the error says what each is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.foreign import LLAMA, llama_weights, write_folder
from vilam3_jax.convert.importer import check_rules, open_source
from vilam3_jax.errors import UserError

ONE = {"x": np.ones(2, np.float32)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def files(*names: str, config: dict | None = None) -> Callable[[Path], None]:
    """Empty files, and a config.json if one is given."""

    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(LLAMA | config))

    return make


def shards(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(LLAMA))
        for name in names:
            save_file(ONE, folder / name)

    return make


def written(name: str, text: str, config: dict | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_folder(folder, LLAMA | (config or {}), llama_weights())
        (folder / name).write_text(text)

    return make


def hub_cache(folder: Path) -> None:
    for name in ("aaa", COMMIT):
        write_folder(folder / "snapshots" / name, LLAMA, llama_weights())
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (files(), "an empty folder"),
        (files("adapter_config.json", "adapter_model.safetensors"), "adapter (PEFT or LoRA) without"),
        (files("adapter_config.json", "adapter_model.bin", config={}), "adapter (PEFT or LoRA) without"),
        (written("adapter_config.json", "{}"), "a model and an unmerged adapter"),
        (files("non_lora_trainables.bin", config={}), "unmerged LoRA of LLaVA"),
        (hub_cache, f"cache of the Hugging Face hub; give DIR/snapshots/{COMMIT} (or another of 2)"),
        (files("models--a--b/x", "models--c--d/x"), "of one model: models--a--b, models--c--d"),
        (files("refs/main", "snapshots/.keep"), "with no snapshots"),
        (shards("model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors has no model.saf"),
        (shards("model-00002-of-00003.safetensors"), "2 of 3 shards are missing"),
        (shards("open_clip_model.safetensors"), "rename the model's own file to model.safetensors"),
        (written("model.safetensors", LFS), "model.safetensors: Git LFS pointer"),
        (written("config.json", LFS), "config.json: Git LFS pointer"),
        (written("config.json", "<!DOCTYPE html><html>log in</html>"), "config.json: web page (HTML)"),
        (written("x", "", {"quantization": {"bits": 4, "group_size": 64}}), "quantised (MLX, 4 bits)"),
        (written("x", "", {"quantization_config": {"quant_method": "gptq", "bits": 4}}), "(gptq, 4 bits)"),
        (written("x", "", {"quantization_config": {"quant_method": "awq", "w_bit": 4}}), "(awq, 4 bits)"),
        (written("x", "", {"quantization_config": {"load_in_4bit": True}}), "(bitsandbytes)"),
        (written("x", "", {"quantization_config": {"quant_method": "fp8"}}), "quantised (fp8)"),
        (written("hf_quant_config.json", "{}"), "quantised by ModelOpt"),
        (files("pytorch_model-00001-of-00002.bin", config={}), "--torch_files"),
        (files("pytorch_model.bin"), "--torch_files"),
        (files("model.Q4_K_M.gguf", config={}), "weights are in a GGUF file; give that file"),
        (files("tf_model.h5", config={}), "TensorFlow or Keras"),
        (files("flax_model.msgpack", config={}), "Flax weights (msgpack)"),
        (files("model.onnx", config={}), "ONNX graph"),
        (files("openvino_model.xml", config={}), "OpenVINO"),
        (files("training_args.bin", "optimizer.pt", config={}), "neither model.safetensors nor"),
        (files("consolidated.00.pth", "params.json", "tokenizer.model"), "Meta's or Mistral's own layout"),
        (files("zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"), "DeepSpeed"),
        (files("__0_0.distcp"), "distributed checkpoint of PyTorch"),
        (files("model_index.json", "unet/config.json"), "diffusers pipeline"),
        (files("_CHECKPOINT_METADATA"), "Orbax checkpoint"),
        (files("model.json", "params/00000"), "export of this package already"),
        (files("checkpoint-10/config.json", "checkpoint-20/config.json"), "one of its checkpoints"),
        (files("VILA/config.json", "README.md"), "give DIR/VILA as --source"),
        (files("a/config.json", "b/config.json"), "holds 2 models; give one as --source: a, b"),
        (files("tokenizer.json", "tokenizer_config.json"), "a tokenizer but no model"),
        (files("model.safetensors"), "but no config.json"),
        (files("model.safetensors.incomplete", config={}), "unfinished download"),
        (files("README.md"), "holds neither config.json nor a .gguf file"),
    ],
)
def test_folders_are_called_what_they_are(tmp_path, make, words):
    folder = tmp_path / "given"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError) as caught:
        check_rules(open_source(folder))
    message = str(caught.value)
    assert words in message.replace(str(folder), "DIR") and message.startswith(str(folder))
    assert "\n" not in message and ";" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.gguf", LFS.encode(), "Git LFS pointer"),
        ("model.gguf", b"", "empty file"),
        ("model.gguf", b"<html><body>404</body></html>", "web page"),
        (
            "model.safetensors",
            b'\x10\0\0\0\0\0\0\0{"x":1}',
            "give the folder that also holds its config.json",
        ),
        ("config.json", b"{}", "give its folder"),
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(30), "give its folder with --torch_files"),
        ("model.zip", b"PK\x03\x04" + bytes(30), "zip archive; unpack it"),
        ("model.tar.gz", b"\x1f\x8b\x08", "gzip"),
        ("scan.dcm", bytes(128) + b"DICM", "DICOM file, not a GGUF file"),
        ("model.onnx", b"\x08\x07", "ONNX graph"),
    ],
)
def test_files_are_called_what_they_are(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_source(file)
    assert words in str(caught.value) and str(caught.value).startswith(f"{file}: ")


def test_a_model_with_ordinary_neighbours_passes(tmp_path):
    write_folder(tmp_path, LLAMA | {"quantization_config": None}, llama_weights(), shards=2)
    for name in ("README.md", ".gitattributes", "training_args.bin", "generation_config.json", "model.onnx"):
        (tmp_path / name).write_text("{}")
    assert check_rules(open_source(tmp_path))
