"""Charts of one run's figures: what was logged is drawn, what was not is left out."""

import json
import re
import shutil

import pytest

from vilam3_jax.report import main


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made / "stages" / "stage3_instruct", tmp_path / "one")


def add(folder, **values):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | (values if "loss" in row else {})) + "\n" for row in rows))


def charts(folder):
    main.main([f"--workdir={folder}"])
    return re.findall(r'aria-label="([^"]*) by step"', (folder / "report.html").read_text())


def test_a_run_without_new_figures_has_its_speed_alone(folder):
    assert charts(folder) == ["Speed"]


def test_all_figures_of_a_run_are_drawn(folder):
    shares = dict(mfu=0.41, input_wait=0.02, token_fill=0.98, image_fill=0.9, goodput=0.8)
    add(folder, tflops_per_device=188.0, **shares)
    add(folder, **{"learning_rate/llm": 1e-4, "learning_rate/projector": 3e-4, "grad_norm": 2.0})
    add(folder, **{"grad_norm/llm": 1.9, "generate_exact_match": 0.25, "generate_token_f1": 0.5})
    with (folder / "metrics.jsonl").open("a") as file:
        for seconds in (2.0, 4.0):
            file.write(json.dumps({"step": 60, "checkpoint_stall": seconds}) + "\n")
    assert charts(folder) == [
        "Speed",
        "Share of peak speed (MFU)",
        "Speed of the model&#x27;s products",
        "Waiting for input",
        "Filled by packing",
        "Goodput",
        "Learning rate",
        "Gradient norm",
        "Held-out answers",
    ]
    page = (folder / "report.html").read_text()
    assert "Steps held up by saves" in page and "2 ×, 6.0 s in all" in page
    assert page.count("image slots") == 1 and "projector" in page


def test_lines_of_one_chart_differ_and_lie_where_the_axis_says(folder):
    add(folder, token_fill=0.5, image_fill=1.0)
    charts(folder)
    page = (folder / "report.html").read_text()
    (chart,) = re.findall(r'aria-label="Filled by packing by step">(.*?)</svg>', page, re.S)
    ticks = {t: float(y) - 3.5 for y, t in re.findall(r'y="([\d.]+)" text-anchor="end">(\d+)<', chart)}
    lines = dict(re.findall(r'class="line (\w+)" d="M[\d.]+ ([\d.]+)', chart))
    assert float(lines["train"]) == pytest.approx(ticks["50"], abs=0.2)
    assert float(lines["part1"]) == pytest.approx(ticks["100"], abs=0.2)


def test_a_figure_that_stays_at_zero_has_no_axis_below_it(folder):
    add(folder, input_wait=0.0)
    charts(folder)
    page = (folder / "report.html").read_text()
    (chart,) = re.findall(r'aria-label="Waiting for input by step">(.*?)</svg>', page, re.S)
    assert re.findall(r'text-anchor="end">([^<]*)<', chart)[0] == "0"
