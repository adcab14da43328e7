"""`vilam3 convert import`: what it writes, prints and refuses."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from foreign import LLAMA, SIGLIP, llama_weights, siglip_weights, write_folder, write_gguf

from tests.in_memory import fill
from vilam3_jax import cli
from vilam3_jax.checkpoints import exports
from vilam3_jax.convert.importer import check_rules, open_source
from vilam3_jax.data.tokenizer import load_tokenizer, train_bpe


def load(out, source):
    """Reads an export as the start of a run does."""
    import jax

    config = exports.load_model_config(out)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = check_rules(open_source(source))
    wanted = {
        path: jax.ShapeDtypeStruct(shape, config.param_dtype, sharding=place)
        for path, shape in shapes.items()
    }
    return config, exports.load_params(out, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_import_writes_a_whole_export(tmp_path, capsys, dtype):
    file = write_gguf(tmp_path / "model.gguf", llama_weights())
    out = tmp_path / "out"
    assert cli.main(["convert", "import", "--source", str(file), "--out", str(out), "--dtype", dtype]) == 0
    config, params = load(out, file)
    expected = fill(open_source(file))
    assert config.kind == "llm" and config.llm.num_kv_heads == 2
    for name, value in expected.items():
        assert params[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(params[name]), value.astype(params[name].dtype))
    assert load_tokenizer(out / "tokenizer").eos_id == 2
    provenance = json.loads((out / "provenance.json").read_text())
    part = provenance["parts"]["llm"]
    assert part["licence"] == {"name": "apache-2.0"} and "jax" in provenance["versions"]
    assert part["source"] == [
        {
            "file": "model.gguf",
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    ]
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    count = sum(value.size for value in expected.values())
    assert rows["parameters"] == f"{count:,}"
    assert rows["bytes"].startswith(f"{count * (4 if dtype == 'float32' else 2):,} ")
    assert [path.name for path in tmp_path.iterdir() if ".partial" in path.name] == []


def test_siglip_import_keeps_the_licence_and_needs_no_tokenizer(tmp_path, capsys):
    folder = write_folder(tmp_path / "siglip", SIGLIP, siglip_weights())
    (folder / "LICENSE").write_text("Apache License")
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    assert cli.main(["convert", "import", "--source", str(folder), "--out", str(out)]) == 0
    config, params = load(out, folder)
    assert config.vision_tower.select_layer == -2 and len(params) == len(fill(open_source(folder)))
    provenance = json.loads((out / "provenance.json").read_text())
    licence = provenance["parts"]["vision_tower"]["licence"]
    assert licence == {"name": "LICENSE", "text": "Apache License"}
    assert "tokenizer         none" in capsys.readouterr().out


def test_tokenizer_can_be_given(tmp_path):
    folder = write_folder(tmp_path / "llama", LLAMA, llama_weights())
    train_bpe(["liver spleen"], 270, tmp_path / "words")
    out = tmp_path / "out"
    words = str(tmp_path / "words")
    assert (
        cli.main(["convert", "import", "--source", str(folder), "--out", str(out), "--tokenizer", words]) == 0
    )
    assert load_tokenizer(out / "tokenizer").vocab_size <= 270


def test_tokenizer_of_a_larger_model_is_refused(tmp_path, capsys):
    folder = write_folder(tmp_path / "llama", LLAMA, llama_weights())
    train_bpe(["liver spleen kidney pancreas"] * 9 + ["effusion opacity nodule"] * 9, 330, tmp_path / "words")
    words = str(tmp_path / "words")
    assert (
        cli.main(
            ["convert", "import", "--source", str(folder), "--out", str(tmp_path / "o"), "--tokenizer", words]
        )
        == 2
    )
    assert "the tokenizer has" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_out_in_use_is_refused_and_untouched(tmp_path, capsys):
    file = write_gguf(tmp_path / "model.gguf", llama_weights())
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert cli.main(["convert", "import", "--source", str(file), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error == f"vilam3 convert: error: {out}: already exists; choose another --out or remove it\n"
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "absent.gguf"], "absent.gguf: no such file or folder"),
        (["--source", "text.txt"], "text.txt: text file, not a GGUF file"),
        (["--source", "empty"], "empty: an empty folder"),
        (["--source", "gs://bucket/model"], "copy them to a local disk first"),
        (["--source", "text.txt", "--format", "onnx"], "--format onnx: unknown; choose from auto, gguf"),
        (["--source", "text.txt", "--format", "siglip_pair"], "needs a model folder"),
        (["--source", "text.txt", "--format", "gguf"], "not a whole GGUF file"),
        (["--source", "text.txt", "--dtype", "int8"], "--dtype int8: unknown; choose from auto, float32"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert cli.main(["convert", "import", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text.txt"]
