"""The commands and files of docs/your_own_expert.md, with the tiny model in place of the quickstart's."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vilam3_experts
from PIL import Image

import vilam3_jax
from vilam3_jax import cli
from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.experts.cards import load_cards, render_cards
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.images import load_pixels
from vilam3_jax.data.tokenizer import train_bpe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "your_own_expert.md"
QUESTIONS = (
    "Does this image show effusion? Answer yes or no. What is the view in this image? Options: AP, PA."
)


def blocks():
    """(language, file named in the line before, text) of every block of the page."""
    for before, language, block in re.findall(
        r"([^\n]*)\n\n```(\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S
    ):
        named = re.match(r"`(\S+)`", before)
        yield language, named and named[1], block


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Films with a bright left lung, or not, and the table of the page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        sick = number % 2 == 0
        film = rng.normal(80, 10, (40, 40))
        film[:, 20:] += 90 if sick else 0
        Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(f"films/f{number}.png")
        call = "DENSITY(left) before effusion" if number % 3 else ""
        rows.append(
            (f"f{number}.png", f"p{number}", ("PA", "AP")[number // 2 % 2], "yes" if sick else "no", call)
        )
    with open("films.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "patient", "view", "effusion", "call"), *rows])
    roots = [tmp_path / "site", *(Path(m.__file__).parents[1] for m in (vilam3_jax, vilam3_experts))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, roots)))
    return tmp_path


def run(program, arguments, capsys):
    """Runs a command of the page; returns its output."""
    if program == "vilam3":
        assert cli.main(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out
    command = [program, *arguments]
    if program == "pip":
        target = ["--target", "site", "--no-build-isolation", "--no-deps", "--no-index"]
        command = [sys.executable, "-m", "pip", *arguments, "-q", *target]
    elif program == "vilam3-experts":
        command = [sys.executable, "-m", "vilam3_experts", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_command_of_the_page_works(folder, capsys):
    ran, out = [], ""
    for language, named, block in blocks():
        if language == "python":
            Path(named).write_text(block)
        for line in [] if language else block.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            arguments = [one.replace(":smollm2_135m", ":tiny") for one in arguments]
            # The quickstart's export and tokenizer are not made here.
            arguments = [one for one in arguments if not one.startswith("--config.init.everything=")]
            if arguments[0] == "train":
                arguments += ["--config.num_steps=4", "--config.data.global_rows=8"]  # 8 devices
                arguments += ["--config.eval_every=4", "--config.eval_batches=1"]
            if arguments[:2] == ["prepare", "table"]:
                cards = render_cards(load_cards("my/cards.json"))
                train_bpe([cards, QUESTIONS] * 3, 700, "runs/quickstart/llm/tokenizer")
            out += run(program, arguments, capsys)
            ran.append(" ".join([program, *arguments[:2]]).split(" --")[0])
    assert [one for one in ran if one.startswith("vilam3")] == [
        "vilam3-experts list", "vilam3-experts annotate", "vilam3-experts annotate",
        "vilam3 prepare table", "vilam3 data check", "vilam3 train",
        "vilam3 evaluate", "vilam3 evaluate compare", "vilam3 chat", "vilam3 chat",
    ]  # fmt: skip
    # The experts saw every film, and the left half is the one on the right.
    store = AnnotationStore("my/annotations")
    keys = store.keys()
    answers = [store.get(*key) for key in keys]
    dense = {
        args: [one.probabilities["dense"] > 0.5 for one in answers if one.args == args]
        for args in ("left", "right")
    }
    assert sum(dense["left"]) == 12 and len(dense["left"]) == 24 and not any(dense["right"])
    # A dialogue calls it before the stated answer, and training and evaluation know the card.
    called = r"⟦[^⟧]*<DENSITY\(left\)>[^⟧]*⟧[^⟦]*effusion[^⟦]*⟦(Yes|No)<\|im_end\|>⟧"
    assert re.search(called, out), out
    assert "<DENSITY(args)>" in out and "no annotation" not in out
    (result,) = [json.loads(p.read_text()) for p in Path("my/eval/stage4_experts").glob("result.json")]
    assert result["annotations"] == "my/annotations" and result["items"] > 0
    (card,) = json.loads(Path("my/run/export/model.json").read_text())["card_list"]
    assert card["name"] == "DENSITY"
    # The live host of the page's last command has the installed expert.
    film = Path("films/f0.png")
    key = image_key(load_pixels(film))
    with ExpertHost([sys.executable, "-m", "vilam3_experts", "host"]) as host:
        live = host.ask("DENSITY", "left", input_key=key, inputs=[("", film.read_bytes())])
    assert live.reason == "" and live.probabilities["dense"] > 0.5
