"""`vilam3 data mixture`: exact counts, and estimates."""

from __future__ import annotations

import re

import numpy as np
import pytest
from data_worlds import annotate, film, pair, picture, report, tokenizer, write

from vilam3_jax.data import main as data_main
from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    write(root / "films", [film(n, rng, expert=True, policy="optional") for n in range(30)])
    write(root / "reports", [report(n, rng) for n in range(20)])
    write(root / "pairs", [pair(n) for n in range(12)])
    write(root / "broken", [Example(f"b{n}", "study", (ImageRef(data=picture(n)),)) for n in range(3)])
    said = [
        Annotation(f"key{n}", "PNEUMONIA", probabilities={"x": 0.9}, version="t") for n in range(0, 30, 2)
    ]
    annotate(root / "said", said)
    tokenizer().save(root / "tokenizer")
    return root


def preview(world, capsys, mixture: str, *more: str, recipe: str = "stage3_instruct") -> str:
    argv = [
        "mixture",
        f"--config=configs/{recipe}.py:tiny",
        f"--config.data.path={world}",
        f"--config.data.mixture={mixture}",
        f"--config.model.tokenizer={world / 'tokenizer'}",
        "--config.model.cards=quickstart",
        "--config.data.seq_len=1024",
        *more,
    ]
    assert data_main.main(argv) == 0
    return capsys.readouterr().out


def cells(out: str, name: str) -> list[str]:
    line = next(line for line in out.splitlines() if re.match(rf"\w\s+{name}\s", line))
    return line.split()


def test_epochs_shares_and_tokens(world, capsys) -> None:
    out = preview(world, capsys, '(("films",2),("reports",1.5))', "--config.num_steps=100")
    films, reports = cells(out, "films"), cells(out, "reports")
    assert films[:6] == ["A", "films", "30", "2", "60", "66.7%"]
    assert reports[:6] == ["B", "reports", "20", "1.5", "30", "33.3%"]
    assert films[9:] == ["1.00", "0%"] and reports[9:] == ["0.00", "0%"]
    assert float(films[8][:-1]) + float(reports[8][:-1]) == pytest.approx(100, abs=0.11)
    assert float(films[6]) / float(reports[6]) == pytest.approx(2 / 1.5, rel=0.01)
    assert "a pass: 90 samples, about" in out and "0% of the samples with expert results" in out
    assert "epochs and samples of a pass are exact" in out


def test_the_first_positions_keep_the_shares(world, capsys) -> None:
    out = preview(world, capsys, '(("films",1),("reports",1))', "--count=120")
    order = out.split("The first 120 positions:\n")[1].split()
    assert [len(line) for line in order] == [50, 50, 20]
    letters = "".join(order)
    for end in range(1, 121):
        assert abs(letters[:end].count("A") - 0.6 * end) <= 1


def test_experts_and_missing_annotations(world, capsys) -> None:
    out = preview(
        world, capsys, '(("films",1),("reports",1))', f"--config.data.annotations={world / 'said'}",
        "--config.data.experts=on", "--samples=30",
    )  # fmt: skip
    assert cells(out, "films")[10] == "50%" and "30% of the samples with expert results" in out
    assert "films: 15 requests of 30 samples have no annotation" in out


def test_records_that_cannot_be_used_are_told(world, capsys) -> None:
    out = preview(world, capsys, '(("films",1),("broken",1))')
    assert "broken: 3 of 3 records tried could not be used" in out
    assert cells(out, "broken")[7:] == ["-"] * 4
    with pytest.raises(UserError, match="no record that was tried can be used"):
        preview(world, capsys, '(("broken",1),)')


def test_an_unknown_name_is_told_with_those_there_are(world, capsys) -> None:
    with pytest.raises(UserError, match=r"dataset 'filmz' in .*, which has broken, films, pairs, reports"):
        preview(world, capsys, '(("filmz",2),)')


def test_pairs(world, capsys) -> None:
    out = preview(
        world, capsys, '(("pairs",1),)', "--config.data.global_pairs=6", "--config.num_steps=4",
        recipe="stage1_vision",
    )  # fmt: skip
    assert cells(out, "pairs")[6] == "2" and "4 steps of about 6 samples, 2 passes" in out


@pytest.mark.parametrize("flag", ["--count=0", "--samples=0"])
def test_numbers_below_one_are_refused(world, capsys, flag) -> None:
    with pytest.raises(UserError, match=rf"{flag}: must be at least 1"):
        preview(world, capsys, '(("films",1),)', flag)
