"""The notebooks of `examples/`: stored without results, and each runs from its first cell to its last."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NAMES = ("ask_a_model", "swap_components", "your_own_data", "your_own_expert")
LIMIT = 900  # seconds, for a busy machine; 150 are enough on two idle cores


def read(name):
    return nbformat.read(EXAMPLES / f"{name}.ipynb", nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_tested_and_listed():
    assert sorted(NAMES) == sorted(file.stem for file in EXAMPLES.glob("*.ipynb"))
    index = (ROOT / "docs" / "index.md").read_text()
    assert all(f"../examples/{name}.ipynb" in index for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_results(name):
    notebook = read(name)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert not cell.metadata and not cell.source.endswith("\n"), cell.id
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
        # A failed `!command` does not stop a notebook; `%%bash -e` does.
        assert not re.search(r"^\s*!", cell.source, re.M), cell.id


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and [link for link in links if not (EXAMPLES / link).exists()] == []


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Runs the first code cell of a notebook; returns the arguments of pip, or None if it was not called."""

    def run(name, missing, folder=tmp_path):
        calls = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module in missing else module)
        monkeypatch.setattr(subprocess, "run", lambda argv, check: calls.append((argv, check)))
        exec(code_cells(read(name))[0].source, {})
        if not calls:
            return None
        ((argv, check),) = calls
        assert argv[:5] == [sys.executable, "-m", "pip", "install", "-q"] and check
        return argv[5:]

    monkeypatch.delenv("VILAM3_WHEEL", raising=False)
    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_installs_what_is_missing(name, install, monkeypatch, tmp_path):
    both = ("vilam3_jax", "vilam3_experts")
    used = "".join(cell.source for cell in code_cells(read(name))[1:])
    needs_experts = re.search("vilam3[-_]experts", used)
    needed = both if needs_experts else both[:1]
    packages = [module.replace("_", "-") for module in needed]
    assert install(name, missing=()) is None
    assert install(name, missing=both) == packages
    assert install(name, missing=both, folder=EXAMPLES) == ["..", "../experts"][: len(needed)]
    wheel = str(tmp_path / "vilam3_jax-1.0-py3-none-any.whl")
    monkeypatch.setenv("VILAM3_WHEEL", wheel)
    assert install(name, missing=both) == [wheel, *packages[1:], "--find-links", str(tmp_path)]
    assert install(name, missing=()) is None


# What a notebook computed, as a last cell of its own.
PROBES = {
    "ask_a_model": """{
        "trigger": reply.transcript.trigger, "answer": reply.answer, "overlay": reply.overlay.shape,
        "organs": {s.name: s.volume_ml for s in reply.transcript.annotations[-1].segments},
    }""",
    "swap_components": """{"counts": counts, "losses": losses}""",
    "your_own_data": """{"accuracy": accuracy, "answer": reply.answer, "questions": len(answers)}""",
    "your_own_expert": """{
        "voxels": int(found.labels.sum()), "triggers": [one.transcript.trigger for one in (stored, live)],
        "results": [[a.status, a.segments[0].name, a.segments[0].voxels, one.answer]
                    for one in (stored, live) for a in one.transcript.annotations],
    }""",
}


def execute(name, folder, monkeypatch):
    """Executes a notebook as a user would; returns (its working folder, what its probe found, pictures)."""
    for variable in (
        "XLA_FLAGS",
        "JAX_COMPILATION_CACHE_DIR",
        "TF_CPP_MIN_LOG_LEVEL",
        "MPLBACKEND",
        "PYTHONPATH",
    ):
        monkeypatch.delenv(variable, raising=False)
    # A kernel is often chosen without activating its environment, so its commands are not on the path.
    scripts = sysconfig.get_path("scripts")
    kept = [one for one in os.environ["PATH"].split(os.pathsep) if one != scripts]
    monkeypatch.setenv("PATH", os.pathsep.join(kept))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(folder / "jupyter"))
    notebook = read(name)
    probe = f"import json\nprint(json.dumps({PROBES[name]}))"
    notebook.cells.append(nbformat.v4.new_code_cell(probe, id="probe"))
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    try:
        asyncio.run(asyncio.wait_for(client.async_execute(), LIMIT))
    except (CellExecutionError, TimeoutError) as error:
        cells = code_cells(notebook)
        started = [cell for cell in cells if cell.execution_count or cell.outputs] or cells[:1]
        pytest.fail(f"{name}.ipynb, {described(started[-1], error)}", pytrace=False)
    pictures = [
        output
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    said = "".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout")
    (work,) = folder.glob("vilam3_*")
    return work, json.loads(said), len(pictures)


def described(cell, error):
    """The failed cell, what it printed, and the error; programs explain their errors on stderr."""
    printed = "".join(output.get("text", "") for output in cell.outputs)
    reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else f"over {LIMIT} s"
    return f"cell {cell.id!r}:\n{cell.source}\n\nprinted:\n{printed[-4000:]}\nfailed: {reason}"


def exported(run):
    return (run / "export" / "model.json").exists() and json.loads((run / "result.json").read_text())[
        "finished"
    ]


@pytest.mark.slow
def test_ask_a_model(tmp_path, monkeypatch):
    work, found, pictures = execute("ask_a_model", tmp_path, monkeypatch)
    assert exported(work / "run")
    assert found["trigger"] == ["ORGANS", "organs"] and found["answer"]
    assert found["overlay"][2] == 3 and pictures == 2
    assert found["organs"]["liver"] > 100


@pytest.mark.slow
def test_swap_components(tmp_path, monkeypatch):
    work, found, _ = execute("swap_components", tmp_path, monkeypatch)
    before, after = (set((work / f"{one}.txt").read_text().splitlines()) for one in ("before", "after"))
    assert "model.llm.hidden_size = 1536" in after - before
    assert all(line.startswith("model.llm.") for line in after - before)
    counts = found["counts"]
    for part, other in (("tower", "llm"), ("projector", "vision_tower"), ("llm", "vision_tower")):
        name = {"tower": "vision_tower"}.get(part, part)
        assert counts[part][name] != counts["tiny"][name] and counts[part][other] == counts["tiny"][other]
    for name, (first, last) in found["losses"].items():
        assert exported(work / "runs" / name) and last < first - 0.5, name


@pytest.mark.slow
def test_your_own_data(tmp_path, monkeypatch):
    work, found, pictures = execute("your_own_data", tmp_path, monkeypatch)
    assert exported(work / "run") and pictures == 1
    rows = [json.loads(line) for line in (work / "majority" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == found["questions"] > 20
    assert found["accuracy"] > sum(row["correct"] for row in rows) / len(rows) + 0.1
    assert found["answer"]


@pytest.mark.slow
def test_your_own_expert(tmp_path, monkeypatch):
    work, found, pictures = execute("your_own_expert", tmp_path, monkeypatch)
    assert exported(work / "run") and pictures == 2
    assert found["triggers"] == [["BONE", ""]] * 2
    stored, live = found["results"]
    assert stored[:3] == ["ok", "bone", found["voxels"]]
    assert live[:2] == ["ok", "bone"] and live[2] != found["voxels"]
    assert all(answer for *_, answer in (stored, live))
