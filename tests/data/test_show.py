"""Tests of `vilam3 data show`: output, files and errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_worlds import annotate, ct_annotation, ct_example, ct_volume, film, write

from vilam3_jax import cli
from vilam3_jax.data.examples import Turn
from vilam3_jax.data.images import decode_image
from vilam3_jax.data.show import main


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    key = ct_volume(folder / "ct")
    hostile = dataclasses.replace(
        ct_example(key, 1),
        turns=(Turn("user", "<image>\n<script>x</script>"), Turn("assistant", "Yes.", True)),
    )
    hostile.meta["question_types"] = ["presence"]
    write(folder / "ct", [ct_example(key, 0), hostile])
    annotate(tmp_path / "said", [ct_annotation(key)])
    return tmp_path


def test_prints_turns_targets_and_question_types(data, capsys) -> None:
    assert main(["--data", str(data / "data"), "--id", "ct1", "--size", "16"]) == 0
    out = capsys.readouterr().out
    assert "[user]\n  <image 1>\n  <script>" in out and "[assistant, target]\n> Yes." in out
    assert 'question_types: ["presence"]' in out and "ORGANS(organs) on image 0 before turn 1" in out
    assert "Let me trigger" not in out


def test_experts_and_files(data, capsys) -> None:
    common = ["--data", str(data / "data" / "ct"), "--annotations", str(data / "said"), "--experts", "on"]
    page, sheet = data / "x.html", data / "x.png"
    assert main([*common, "--index", "1", "--size", "16", "--out", str(page)]) == 0
    assert main([*common, "--size", "16", "--out", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "[assistant, target]\n> This looks like a CT image." in out and "The results are <image 2>" in out
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2 and "<script>" not in text and "&lt;script&gt;" in text
    image = decode_image(sheet.read_bytes())
    assert image.shape == (16, 32, 3) and not np.array_equal(image[:, :16], image[:, 16:])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--index", "7"], "has 2 examples"),
        (["--id", "none"], "no example 'none'"),
        (["--split", "test"], "it has train"),
        (["--experts", "on"], "--annotations"),
        (["--out", "x.gif"], ".html or .png"),
        (["--dataset", "other"], "vilam3 prepare"),
    ],
)
def test_refusals_are_one_line(data, capsys, arguments: list[str], reason: str) -> None:
    assert cli.main(["data", "show", "--data", str(data / "data"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vilam3 data: error: ") and reason in error and error.count("\n") == 1


def test_several_datasets_ask_which(data, capsys) -> None:
    write(data / "data" / "films", [film(0, np.random.default_rng(0))])
    assert cli.main(["data", "show", "--data", str(data / "data")]) == 2
    assert "ct, films; choose one with --dataset" in capsys.readouterr().err
    assert main(["--data", str(data / "data"), "--dataset", "films", "--size", "8"]) == 0
