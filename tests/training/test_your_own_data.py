"""The commands of docs/your_own_data.md, with the tiny model in place of the quickstart's."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vilam3_jax
from vilam3_jax import cli
from vilam3_jax.checkpoints import exports
from vilam3_jax.data.tokenizer import train_bpe

PAGE = Path(__file__).parents[2] / "docs" / "your_own_data.md"


def commands():
    """The commands of the page, as argument lists."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        for line in [] if language else block.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "vilam3"
            yield arguments


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    rng = np.random.default_rng(0)
    table, dialogues = [], []
    for number in range(24):
        sick = number % 2 == 0
        image = rng.normal(90 if sick else 150, 20, (40, 40)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(f"films/f{number}.png")
        table.append((f"f{number}.png", f"p{number}", "effusion" if sick else "normal"))
        turns = [("human", "<image>\nIs there an effusion?"), ("gpt", "yes" if sick else "no")]
        dialogues.append(
            {
                "image": f"f{number}.png",
                "patient": f"p{number}",
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
    with open("films.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "patient", "finding"), *table])
    Path("dialogues.json").write_text(json.dumps(dialogues))
    texts = ["What is the finding in this image? Options: effusion, normal. Is there an effusion? yes no"]
    train_bpe(texts * 3, 400, "runs/quickstart/llm/tokenizer")
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_page_works(folder, capsys):
    ran = []
    for arguments in commands():
        arguments = [one.replace(":smollm2_135m", ":tiny") for one in arguments]
        # The quickstart's export is the only thing that is not made here.
        arguments = [one for one in arguments if not one.startswith("--config.init.everything=")]
        if arguments[0] == "train":
            arguments += ["--config.num_steps=20", "--config.data.global_rows=8"]  # the tests have 8 devices
        assert cli.main(arguments) == 0, capsys.readouterr().err
        ran.append(" ".join(arguments[:2]))
    out = capsys.readouterr().out
    assert [one.split(" --")[0] for one in ran] == [
        "prepare table", "prepare instructions", "data check", "train", "evaluate", "evaluate",
        "evaluate compare", "report", "chat",
    ]  # fmt: skip
    assert "⟦effusion<|im_end|>⟧" in out and "majority - mine" in out
    config = exports.load_model_config("my/run/export")
    assert config.llm.lora_rank == 16
    rows = [json.loads(line) for line in Path("my/run/eval/mine/rows.jsonl").read_text().splitlines()]
    assert rows and {row["question_type"] for row in rows} == {"finding"}
    answers = Path("my/run/report_answers.html").read_text()
    assert answers.count('class="question"') == len(rows) and answers.count('class="reply"') == 2 * len(rows)
    assert answers.count("<img ") == len({row["item"].rpartition("/q")[0] for row in rows})
    assert "report_answers.html" in Path("my/run/report.html").read_text()
    with vilam3_jax.load("my/run") as assistant:
        assert isinstance(assistant.ask("films/f1.png", "Is there an effusion?").answer, str)
