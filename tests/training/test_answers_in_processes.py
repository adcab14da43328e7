"""Held-out answers: two processes equal one; a killed and resumed run writes each answer once."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.training.process_worlds import (
    arguments,
    children,
    environment,
    make_world,
    run,
    run_script,
    start,
)
from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import exports
from vilam3_jax.models import build
from vilam3_jax.training import evaluation, writers

SETTINGS = {
    "data.seq_len": 192,
    "eval_every": 5,
    "eval_batches": 1,
    "eval_generate": 7,
    "num_steps": 20,
    "checkpoint_every": 3,
}
MESHES = ({"fsdp": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "context": 2}, {"tensor": 4})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, and an export with enlarged weights, so that its texts depend on image and question."""
    root = make_world(tmp_path_factory.mktemp("world"))
    config = config_lib.load("configs/stage3_instruct.py:tiny", {})
    params = jax.jit(lambda key: build.init_params(config.model, config.task, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
    model = {**config.model.to_dict(), "kind": config.task}
    exports.export_model(root / "export", params, model, str(root / "tokenizer"), {})
    return root


ANSWERS = """
    import functools, json, sys
    from absl import flags
    from vilam3_jax import config
    from vilam3_jax.runtime import compat, processes
    from vilam3_jax.inference import heldout
    from vilam3_jax.sharding import mesh as mesh_lib
    from vilam3_jax.training import program as program_lib
    values = flags.FlagValues()
    processes.define_flags(values)
    values(["test", *sys.argv[4:]])
    overrides, meshes, devices = map(json.loads, sys.argv[1:4])
    with processes.group("program", **processes.flag_values(values)):
        compat.use_cpu_devices(devices)
        for sizes in meshes:
            changed = {f"mesh.{axis}": size for axis, size in {"fsdp": 1, **sizes}.items()}
            cfg = config.load("configs/stage3_instruct.py:tiny", {**overrides, **changed})
            program = program_lib.build(cfg, mesh_lib.build_mesh(cfg.mesh))
            params = program.initial_state()[0].params()
            context = functools.partial(program.context, whole_rows=True)
            answer = heldout.HeldoutAnswers(
                cfg.data, cfg.model, cfg.seed, cfg.eval_generate, mesh_lib.rows(program.mesh), context,
                program.annotate,
            )
            rows, _ = answer(params)
            if processes.is_primary_process():
                print("ANSWERS", json.dumps(rows))
"""


def answers(world: Path, processes: int) -> list[list[dict]]:
    """Answers per mesh of processes with four devices in total."""
    overrides = {
        "data.path": str(world / "data"),
        "model.tokenizer": str(world / "tokenizer"),
        "data.experts": "off",
        "init.everything": str(world / "export"),
        **SETTINGS,
    }
    settings = [json.dumps(value) for value in (overrides, MESHES, 4 // processes)]
    done = run_script(ANSWERS, processes, *settings, env=environment(world))
    assert [code for code, *_ in done] == [0] * processes, done
    assert not any("ANSWERS" in said for _, said, _ in done[1:])
    return [json.loads(line.split(" ", 1)[1]) for line in done[0][1].splitlines() if "ANSWERS" in line]


@pytest.mark.slow
def test_two_processes_answer_as_one_does(world):
    one, two = answers(world, 1), answers(world, 2)
    assert len(one) == len(MESHES) and one == two
    assert all(len(rows) == SETTINGS["eval_generate"] for rows in one)
    assert all(len({row["answer"] for row in rows}) > 2 for rows in one), "alike, they would prove little"


def steps_answered(workdir: Path) -> list[int]:
    path = workdir / evaluation.GENERATIONS_FILE
    return [row["step"] for row in writers.read_lines(workdir, path.name)]


@pytest.mark.slow
def test_killed_among_its_answers_a_run_writes_each_once(world):
    """Killed after the answers of step 10; the newest checkpoint is of step 9 or 6."""
    settings: dict[str, Any] = {**SETTINGS, "init.everything": world / "export"}
    whole, killed = world / "whole", world / "killed"
    settings["mesh.cpu_devices"] = 2
    run(world, 2, arguments(world, whole, **settings))
    argv = arguments(world, killed, **settings)
    process = start(world, 2, argv)
    deadline = time.monotonic() + 900
    while 10 not in steps_answered(killed):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode
    assert max(steps_answered(killed)) < SETTINGS["num_steps"]
    run(world, 2, argv)
    assert steps_answered(killed) == [step for step in (0, 5, 10, 15, 20) for _ in range(7)]
    one, two = ((folder / evaluation.GENERATIONS_FILE).read_text() for folder in (whole, killed))
    assert one == two
    rows = [row for row in writers.read_lines(killed) if "generate_token_f1" in row]
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20]
