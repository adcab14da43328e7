"""`make resume-demo`: it ends well, and it would notice a difference."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "resume_demo.py"


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("resume_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(demo, tmp_path):
    """An unbroken run of two processes, and one that resumed at step 4 with one."""
    for name, processes, first in (("unbroken", 2, 1), ("resumed", 1, 5)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": step, "loss": 1 / step} for step in range(1, demo.STEPS + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = [[f"{step}a", f"{step}b"] for step in range(first, demo.STEPS + 1)]
        for number in range(processes):
            parts = [step[number::processes] for step in steps]
            file = folder / demo.SAMPLES.format(number)
            file.write_text("".join(json.dumps(part) + "\n" for part in parts))
    return tmp_path


def test_equal_runs_are_the_same(demo, runs, capsys):
    assert demo.compare(runs, "resumed", 4, 0.0)
    assert "all 8 are those of the unbroken run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("samples_of_process_0.jsonl", "8a", "7b"),
        ("metrics.jsonl", '"step": 8, "loss": 0.125', '"step": 8, "loss": 0.1251'),
    ],
)
def test_a_difference_is_noticed(demo, runs, capsys, file, before, after):
    path = runs / "resumed" / file
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert not demo.compare(runs, "resumed", 4, demo.TOLERANCE)
    assert "DIFFER" in capsys.readouterr().out


def test_digests_do_not_depend_on_the_place_of_a_sample(demo):
    batch = type("Batch", (), {})()
    batch.tokens = np.array([[5, 6, 7, 0], [8, 9, 0, 0]])
    batch.segment_ids = np.array([[1, 1, 2, 0], [1, 1, 0, 0]])
    batch.images, batch.image_valid = np.zeros((1, 2, 4, 4, 3), np.uint8), np.array([[True, False]])
    found = list(demo.digests(batch))
    assert len(found) == 4
    batch.tokens, batch.segment_ids = batch.tokens[::-1], batch.segment_ids[::-1]
    assert sorted(demo.digests(batch)) == sorted(found)


@pytest.mark.slow
def test_the_demonstration(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dir", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parents[1],
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("those of the unbroken run") == 2
    assert "bitwise equal" in done.stdout and "the runs are the same" in done.stdout
