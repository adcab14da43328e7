"""Charts of one run: logged metrics are drawn, others skipped."""

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


def svg(folder, title):
    page = (folder / "report.html").read_text()
    (chart,) = re.findall(rf'aria-label="{title} by step">.*?</svg>', page, re.S)
    return chart


def ticks(chart):
    return re.findall(r"text-anchor: end[^>]*>([^<]*)<", chart)


def heights(chart, colour):
    """Where lines of a colour start."""
    return [
        float(y)
        for y in re.findall(rf'd="M [\d.]+ ([\d.]+)[^"]*" style="[^"]*stroke: var\(--{colour}\)', chart)
    ]


def test_a_run_without_new_figures_has_its_speed_alone(folder):
    assert charts(folder) == ["Throughput"]


def test_all_figures_of_a_run_are_drawn(folder):
    shares = dict(mfu=0.41, input_wait=0.02, token_fill=0.98, image_fill=0.9, goodput=0.8)
    add(folder, tflops_per_device=188.0, **shares)
    add(folder, **{"learning_rate/llm": 1e-4, "learning_rate/projector": 3e-4, "grad_norm": 2.0})
    add(folder, **{"grad_norm/llm": 1.9, "generate_exact_match": 0.25, "generate_token_f1": 0.5})
    with (folder / "metrics.jsonl").open("a") as file:
        for seconds in (2.0, 4.0):
            file.write(json.dumps({"step": 60, "checkpoint_stall": seconds}) + "\n")
    assert charts(folder) == [
        "Throughput",
        "Model FLOP/s utilization (MFU)",
        "Model FLOP/s",
        "Input wait",
        "Packing efficiency",
        "Goodput",
        "Learning rate",
        "Gradient norm",
        "Held-out answers",
    ]
    page = (folder / "report.html").read_text()
    assert "Checkpoint stalls" in page and "2 ×, 6.0 s in total" in page
    assert page.count("image slots") == 1 and "projector" in page


def test_lines_of_one_chart_differ_and_lie_where_the_axis_says(folder):
    add(folder, token_fill=0.5, image_fill=1.0)
    charts(folder)
    chart = svg(folder, "Packing efficiency")
    grid = dict(zip(ticks(chart), heights(chart, "line"), strict=True))
    assert heights(chart, "soft") == pytest.approx([grid["50"]], abs=0.01)
    assert heights(chart, "accent") == pytest.approx([grid["100"]], abs=0.01)


def test_a_figure_that_stays_at_zero_has_no_axis_below_it(folder):
    add(folder, input_wait=0.0)
    charts(folder)
    assert ticks(svg(folder, "Input wait"))[0] == "0"
