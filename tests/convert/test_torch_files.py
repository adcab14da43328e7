"""Pickled PyTorch weights: read only with --torch_files, and only tensors."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from foreign import LLAMA, llama_weights

from vilam3_jax import cli

torch = pytest.importorskip("torch")


class Hostile:
    def __reduce__(self):
        return print, ("run",)


def write(folder, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    names = sorted(weights)
    for part, some in enumerate((names[:9], names[9:])):
        state = {name: torch.from_numpy(weights[name]) for name in some}
        torch.save(state, folder / f"pytorch_model-{part}.bin")
    torch.save(Hostile(), folder / "training_args.bin")


def test_pickled_weights(tmp_path, capsys):
    from vilam3_jax.checkpoints.exports import stored_rows

    weights = llama_weights()
    write(tmp_path / "theirs", weights)
    command = ["convert", "import", "--source", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]
    assert cli.main(command) == 2
    assert "--torch_files" in capsys.readouterr().err
    assert cli.main([*command, "--torch_files"]) == 0
    found = stored_rows(tmp_path / "ours")["llm/lm_head/kernel"][0].read()
    np.testing.assert_array_equal(found, weights["lm_head.weight"].T)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_safetensors_beside_pickles_stay_as_they_are(tmp_path, capsys):
    write(tmp_path / "theirs", llama_weights())
    own = tmp_path / "theirs" / "from_pickle-00001.safetensors"
    own.write_bytes(b"mine")
    command = ["convert", "import", "--source", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]
    assert cli.main([*command, "--torch_files"]) == 0
    assert own.read_bytes() == b"mine"
    missing = ["--source", str(tmp_path / "absent"), "--out", str(tmp_path / "x"), "--torch_files"]
    assert cli.main(["convert", "import", *missing]) == 2
    assert "absent: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["code", "cut", "list", "twice"])
def test_what_is_no_dict_of_tensors_is_refused(tmp_path, capsys, damage):
    write(tmp_path / "theirs", llama_weights())
    file = tmp_path / "theirs" / "pytorch_model-1.bin"
    if damage == "code":
        file.write_bytes(pickle.dumps({"x": Hostile()}))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-2000])
    elif damage == "list":
        torch.save([torch.zeros(3)], file)
    else:
        file.write_bytes((tmp_path / "theirs" / "pytorch_model-0.bin").read_bytes())
    out = ["--out", str(tmp_path / "ours"), "--torch_files"]
    assert cli.main(["convert", "import", "--source", str(tmp_path / "theirs"), *out]) == 2
    said = capsys.readouterr()
    assert "its PyTorch files cannot be read" in said.err and said.err.count("\n") == 1
    assert "run" not in said.out.split()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
