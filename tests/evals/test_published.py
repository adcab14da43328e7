"""Published figures, and own results among them."""

from __future__ import annotations

import json

import pytest

from vilam3_jax.cli import guarded
from vilam3_jax.evals import main as evaluate
from vilam3_jax.evals import published


def test_every_figure_has_a_source_and_stands_once():
    known = published.figures()
    assert all(one.source and 0 < one.value < 100 for one in known)
    keys = [(one.system, one.benchmark, one.protocol) for one in known]
    assert len(set(keys)) == len(keys)


def test_a_result_stands_only_below_its_own_protocol():
    estimate = {"value": 0.5, "interval": [0.4, 0.625], "n": 20, "unparsed": 3}
    parity = {"protocol": {"id": "vila-m3/parity/slake", "version": 1}, "estimates": [estimate]}
    strict = {"protocol": {"id": "vila-m3/strict/slake", "version": 1}, "estimates": [estimate]}
    tables = {one.title: one for one in published.published_tables([("mine", parity), ("mine", strict)])}
    slake = tables["slake"]
    rows = {row[0]: dict(zip(slake.columns, row, strict=True)) for row in slake.rows}
    assert rows["mine (measured here)"]["vila-m3 exact match"] == "50.0 (40.0 to 62.5), n 20, 3 unparsed"
    assert sum(bool(cell) for cell in rows["mine (measured here)"].values()) == 2
    assert rows["VILA-M3 8B"]["vila-m3 exact match"] == "84.5"
    assert rows["MedGemma 4B"]["vila-m3 exact match"] == ""
    assert "vila-m3/strict/slake@1" in tables  # a table of its own, as nobody published that protocol


def test_the_averages_of_the_abstract_are_computed_and_named():
    rows = {(row[0], row[1]): row for row in published.claimed_averages().rows}
    gemini = rows["best of 3B to 40B", "Med-Gemini"]
    assert gemini[2] == "8"
    # VQA-RAD, SLAKE, PathVQA, MIMIC-VQA, BLEU-4, ROUGE-L, ChestX-ray14, CheXpert.
    points = (
        90.4 - 78.8,
        84.5 - 84.8,
        92.7 - 83.3,
        86.4 - 78.6,
        21.6 - 20.5,
        32.3 - 28.3,
        51.3 - 46.7,
        61.5 - 48.3,
    )
    assert gemini[3] == f"{sum(points) / 8:+.1f}" and gemini[-1] == "not reproduced"


@pytest.mark.parametrize("ending", ["html", "md", "json"])
def test_the_command_writes_all_formats(tmp_path, capsys, ending):
    out = tmp_path / f"published.{ending}"
    assert guarded("evaluate", evaluate.main, ["published", f"--out={out}"]) == 0
    assert "not reproduced" in capsys.readouterr().out
    text = out.read_text()
    assert "VILA-M3 8B" in text and "not reproduced" in text
    if ending == "html":
        assert "http" not in text and "not for clinical use" in text
    if ending == "json":
        assert {table["title"] for table in json.loads(text)} >= {"vqa-rad", "slake", "path-vqa"}
