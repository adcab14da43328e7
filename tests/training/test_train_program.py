"""The train program on small real files: resume after a signal, after SIGKILL, export, wrong inputs."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import vilam3_jax
from vilam3_jax import cli, train
from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import exports
from vilam3_jax.datasets import phantoms, prepare, train_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.training import telemetry

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Phantoms, their datasets and a tokenizer."""
    root = tmp_path_factory.mktemp("world")
    phantoms.make_phantoms(root / "samples", seed=1, num=3)
    arguments = [
        "quickstart",
        "--source",
        str(root / "samples"),
        "--out",
        str(root / "data"),
        "--size",
        "smoke",
    ]
    assert prepare.main(arguments) == 0
    train_tokenizer.main(["--data", str(root / "data"), "--out", str(root / "tokenizer"), "--vocab_size=600"])
    return root


def settings(world, **overrides):
    return {
        "data.path": str(world / "data"),
        "model.tokenizer": str(world / "tokenizer"),
        "data.seq_len": 128,
        "data.global_rows": 4,
        "data.loader_shards": 2,
        "data.global_pairs": 8,
        "data.experts": "off",
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "mesh.cpu_devices": 4,
        "num_steps": STEPS,
        "loss_chunk": 32,
        "ema_decay": 0.9,
        "skip.spike": 50.0,
        **overrides,
    }


def arguments(world, workdir, stage="stage3_instruct", **overrides):
    flags = [f"--config.{key}={value}" for key, value in settings(world, **overrides).items()]
    return [f"--config=configs/{stage}.py:tiny", f"--workdir={workdir}", "--quiet", *flags]


def run(*argv, **options):
    return subprocess.run(
        [sys.executable, "-m", "vilam3_jax.train", *argv],
        capture_output=True,
        text=True,
        timeout=900,
        **options,
    )


def losses(workdir):
    return {row["step"]: row["loss"] for row in telemetry.read_metrics(workdir) if "loss" in row}


def exported(workdir):
    params, _, _ = exports.load_export(workdir / "export")
    return params


def assert_same_run(one, two):
    assert losses(one) == losses(two)
    for a, b in zip(jax.tree.leaves(exported(one)), jax.tree.leaves(exported(two)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(world):
    workdir = world / "uninterrupted"
    result = run(*arguments(world, workdir))
    assert result.returncode == 0, result.stderr
    assert f"step {STEPS} of {STEPS}" in result.stdout
    assert f"next: vilam3 report --workdir={workdir}" in result.stdout
    assert json.loads((workdir / "result.json").read_text())["finished"]
    assert len(losses(workdir)) == STEPS
    return workdir


def test_a_checkpoint_exports_what_the_run_exported(uninterrupted, tmp_path, capsys):
    assert cli.main(["export", f"--workdir={uninterrupted}", f"--out={tmp_path / 'again'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "again")
    again, config, tokenizer = exports.load_export(tmp_path / "again")
    assert config == exports.load_model_config(uninterrupted / "export")
    assert (tokenizer / "tokenizer.json").exists()
    before = exported(uninterrupted)
    assert jax.tree.structure(again) == jax.tree.structure(before)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(before), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert cli.main(["export", f"--workdir={uninterrupted}", "--step=3"]) == 2
    assert f"has no step 3; it has {STEPS}" in capsys.readouterr().err
    assert cli.main(["export", f"--workdir={tmp_path}"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_the_export_of_a_run_is_found(uninterrupted, tmp_path):
    assert (
        exports.locate(uninterrupted) == exports.locate(uninterrupted / "export") == uninterrupted / "export"
    )
    unfinished = tmp_path / "run"
    (unfinished / "checkpoints").mkdir(parents=True)
    assert exports.locate(unfinished) is None
    for step in (9, 10):
        shutil.copytree(uninterrupted / "export", unfinished / f"export_step_{step}")
    assert exports.locate(unfinished).name == "export_step_10"


def test_stopped_and_resumed_equals_uninterrupted(world, uninterrupted):
    workdir = world / "stopped"
    workdir.mkdir()
    (workdir / train.RESULT_FILE).write_text("{}")  # of a shorter run that is continued
    assert run(*arguments(world, workdir), "--stop_after=3").returncode == 0
    assert max(losses(workdir)) == 3 and not (workdir / "export").exists()
    assert not (workdir / train.RESULT_FILE).exists()
    assert run(*arguments(world, workdir)).returncode == 0
    assert_same_run(workdir, uninterrupted)


@pytest.mark.slow
def test_a_run_over_quantised_kernels_resumes_and_exports_a_model(world):
    pytest.importorskip("qwix")
    settings = {
        "quantization.frozen": "nf4",
        "model.llm.lora_rank": 4,
        "model.llm.lora_targets": "('q', 'down')",
        "trainable": "(('llm/.*lora_[ab]', 1.0), ('.*', 0.0))",
        "num_steps": 3,
    }
    whole, stopped = world / "qlora", world / "qlora_stopped"
    result = run(*arguments(world, whole, **settings))
    assert result.returncode == 0, result.stderr
    assert run(*arguments(world, stopped, **settings), "--stop_after=1").returncode == 0
    assert run(*arguments(world, stopped, **settings)).returncode == 0
    assert_same_run(stopped, whole)
    kernel = exported(whole)["llm"]["layers"]["attn"]["q"]["kernel"]
    assert kernel.dtype == np.float32
    assert len(np.unique(kernel[0, :, 0])) <= 16  # 64 rows, a tile: so many values has the type
    again = world / "qlora_again"
    assert cli.main(["export", f"--workdir={whole}", f"--out={again}"]) == 0
    for a, b in zip(*map(jax.tree.leaves, (exports.load_export(again)[0], exported(whole))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_figures_and_answers_of_a_resumed_run_are_those_of_an_uninterrupted_one(world):
    settings = {
        "data.seq_len": 192,
        "log_every": 2,
        "eval_every": 4,
        "eval_batches": 1,
        "eval_generate": 3,
        "checkpoint_every": 3,
        "telemetry.writers": "('tensorboard',)",
    }
    whole, resumed = world / "figures_whole", world / "figures_resumed"
    assert run(*arguments(world, whole, **settings)).returncode == 0
    assert run(*arguments(world, resumed, **settings), "--stop_after=6").returncode == 0
    # As after a kill between two checkpoints: lines of steps after the checkpoint.
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.0}\n')
    with (resumed / "generations.jsonl").open("a") as file:
        file.write('{"step": 7, "id": "nobody"}\n')
    assert run(*arguments(world, resumed, **settings)).returncode == 0

    same = (
        "loss",
        "tokens",
        "grad_norm/llm",
        "learning_rate/llm",
        "token_fill",
        "heldout_true",
        "heldout_swapped",
    )
    rows = [telemetry.read_metrics(folder) for folder in (whole, resumed)]
    for key in same:
        one, two = ([(row["step"], row[key]) for row in some if key in row] for some in rows)
        assert one == two and len(one) >= 2, key
    assert [row["step"] for row in rows[1] if "loss" in row] == [2, 4, 6, 8]
    goodput = [row["goodput"] for row in rows[1] if "goodput" in row]
    assert 0 < goodput[-1] < 1
    assert {row["step"] for row in rows[1] if "checkpoint_stall" in row} == {3, 6, 8}
    answers = [(folder / "generations.jsonl").read_text() for folder in (whole, resumed)]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 9

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("generate_token_f1")] == [0, 4, 8]


@pytest.mark.slow
def test_answers_take_no_time_of_the_steps(world, monkeypatch):
    """Three evaluations, each longer than all steps together."""
    asked, monitors = [], []

    class Slow:
        def __init__(self, *_):
            pass

        def __call__(self, params):
            asked.append(sorted(params))
            time.sleep(5)
            return [], {"generate_token_f1": 0.0}

    class Kept(telemetry.Telemetry):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            monitors.append(self)

    monkeypatch.setattr(train.heldout, "HeldoutAnswers", Slow)
    monkeypatch.setattr(train.telemetry, "Telemetry", Kept)
    settings = {
        "data.path": str(world / "data"),
        "model.tokenizer": str(world / "tokenizer"),
        "data.seq_len": 128,
        "num_steps": 4,
        "eval_every": 2,
        "eval_batches": 1,
        "eval_generate": 1,
    }
    config = config_lib.load("configs/stage3_instruct.py:tiny", settings)
    train.train(config, world / "slow_answers", quiet=True)
    assert len(asked) == 3 and asked[0] == asked[2]

    rows = telemetry.read_metrics(world / "slow_answers")
    evaluations = {row["step"]: row["evaluation_seconds"] for row in rows if "evaluation_seconds" in row}
    assert evaluations.keys() == {0, 2, 4} and min(evaluations.values()) > 5
    steps = [row for row in rows if "loss" in row]
    before = [0, *(row["tokens"] for row in steps)]
    seconds = [
        (row["tokens"] - tokens) / row["tokens_per_second"]
        for row, tokens in zip(steps, before, strict=False)
    ]
    assert len(seconds) == 4 and max(seconds) < 5, seconds
    clock = monitors[0].clock
    assert clock.productive <= clock.seconds - sum(evaluations.values())
    assert clock.productive == pytest.approx(sum(seconds), rel=0.5)


def start_and_wait(argv, workdir, step):
    process = subprocess.Popen(
        [sys.executable, "-m", "vilam3_jax.train", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        if max(losses(workdir), default=0) >= step:
            return process
        time.sleep(0.02)
    raise AssertionError(f"never reached step {step}: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent,code", [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_killed_and_resumed_equals_uninterrupted(world, sent, code):
    longer = {"num_steps": 300, "checkpoint_every": 40}
    whole, killed = world / "whole_long", world / f"killed_{sent.name}"
    if not (whole / "export").exists():
        assert run(*arguments(world, whole, **longer)).returncode == 0
    argv = arguments(world, killed, **longer)
    process = start_and_wait(argv, killed, step=90)
    process.send_signal(sent)
    assert process.wait(timeout=900) == code
    assert max(losses(killed)) < 300, "the run ended before the signal came"
    assert run(*argv).returncode == 0
    assert_same_run(killed, whole)


def test_sigterm_while_a_run_starts_saves_and_ends(world, monkeypatch):
    build = train.program_lib.build

    def build_and_hear(*settings):
        signal.raise_signal(signal.SIGTERM)
        return build(*settings)

    monkeypatch.setattr(train.program_lib, "build", build_and_hear)
    settings = {"data.path": str(world / "data"), "model.tokenizer": str(world / "tokenizer")}
    settings |= {"data.seq_len": 128, "data.global_rows": 8, "eval_every": 2, "num_steps": 4}
    config = config_lib.load("configs/stage3_instruct.py:tiny", settings)
    before = signal.getsignal(signal.SIGTERM)
    result = train.train(config, world / "early", quiet=True)
    assert (result.steps, result.finished) == (0, False)
    assert (world / "early" / "checkpoints" / "0").is_dir() and not telemetry.read_metrics(world / "early")[
        1:
    ]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_each_stage_starts_from_the_one_before(world):
    one = world / "stage1"
    assert run(*arguments(world, one, "stage1_vision", num_steps=2)).returncode == 0
    two = world / "stage2a"
    tower = f"--config.init.vision_tower={one / 'export'}"
    assert run(*arguments(world, two, "stage2a_align", num_steps=2), tower).returncode == 0
    before, after = exported(one)["vision_tower"], exported(two)["vision_tower"]
    np.testing.assert_array_equal(before["patch_embed"]["kernel"], after["patch_embed"]["kernel"])
    assert np.any(exported(two)["projector"]["fc1"]["kernel"] != 0)


@pytest.mark.parametrize(
    "key, value, init, message",
    [
        ("mlp_dim", 64, "everything", r"mlp_dim=128.*64.*another model"),
        ("hidden_size", 96, "projector", r"projector/\S+ has shape \(.*64.* this model needs \(.*96"),
    ],
)
def test_another_model_is_refused_by_name(world, uninterrupted, key, value, init, message):
    config = config_lib.load(
        "configs/stage3_instruct.py:tiny",
        {
            "data.path": str(world / "data"),
            "model.tokenizer": str(world / "tokenizer"),
            f"model.llm.{key}": value,
            f"init.{init}": str(uninterrupted / "export"),
            "mesh.fsdp": 8,
        },
    )
    with pytest.raises(UserError, match=message):
        train.train(config, world / "refused", quiet=True)
    assert not (world / "refused" / "checkpoints").exists() or not any(
        (world / "refused" / "checkpoints").iterdir()
    )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"mesh.fsdp": 3}, "mesh"),
        ({"data.path": "/nowhere"}, "/nowhere"),
        ({"model.tokenizer": "/nowhere"}, "/nowhere"),
        ({"init.llm": "/nowhere"}, "/nowhere"),
        ({"data.global_rows": 3, "data.loader_shards": 1}, "global_rows"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(world, tmp_path, change, message):
    result = run(*arguments(world, tmp_path / "run", **change))
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_workdir_that_cannot_be_is_one_line(world, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(*arguments(world, tmp_path / "file" / "run"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert str(tmp_path / "file" / "run") in result.stderr


def test_records_that_cannot_be_used_are_named(world, tmp_path):
    result = run(*arguments(world, tmp_path / "run", num_steps=2, **{"data.seq_len": 96}))
    assert result.returncode == 0, result.stderr
    named = json.loads((tmp_path / "run" / "skipped_records.json").read_text())
    counts = [row.get("records_skipped") for row in telemetry.read_metrics(tmp_path / "run")]
    assert named and len(named) in counts and f"{len(named)} record(s) were skipped" in result.stderr
    assert all("raise data.seq_len" in reason for reason in named.values())


def test_a_checkpoint_of_another_architecture_is_not_gone_on_from(world, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    changes = {"model.llm.rope_theta": 5000.0, "model.llm.norm_eps": 0.1}
    result = run(*arguments(world, tmp_path / "run", **changes))
    assert result.returncode == 2 and "another model" in result.stderr
    assert "llm.rope_theta=" in result.stderr and "llm.norm_eps=" in result.stderr
    changes = {"model.llm.num_layers": 3, "optimizer.name": "lion"}
    result = run(*arguments(world, tmp_path / "run", **changes))
    assert result.returncode == 2 and "does not fit this config" in result.stderr
    assert 'model.llm.num_layers: 2 → 3; optimizer.name: "adamw" → "lion";' in result.stderr
    assert " more)" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_resumed_run_says_what_changed_and_keeps_the_record(world, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    record = (tmp_path / "run" / "config.json").read_text()

    def config(**changed):
        on_the_devices_of_tests = {"mesh.fsdp": 4, "mesh.cpu_devices": 0}
        values = settings(world, **on_the_devices_of_tests, **changed)
        return config_lib.load("configs/stage3_instruct.py:tiny", values)

    train.train(config(**{"schedule.peak": 0.5}), tmp_path / "run")
    shown = capsys.readouterr().out
    assert f"stage3_instruct: finished at step {STEPS}; nothing to do" in shown
    assert "another --workdir" in shown
    assert re.search(r"^  schedule.peak: \S+ → 0.5$", shown, re.MULTILINE) and "  mesh.fsdp: 2 → 4\n" in shown
    assert (tmp_path / "run" / "config.json").read_text() == record
    changed = json.loads((tmp_path / "run" / f"config_from_step_{STEPS}.json").read_text())
    assert changed["schedule"]["peak"] == 0.5
    with pytest.raises(UserError, match=r"config init.llm: .* another --workdir"):
        train.train(config(**{"init.llm": str(tmp_path)}), tmp_path / "run")


def test_a_result_is_complete(uninterrupted):
    result = json.loads((uninterrupted / train.RESULT_FILE).read_text())
    assert set(result) == {field.name for field in dataclasses.fields(train.Result)}
    assert result["steps"] == STEPS and result["tokens"] > 0


@pytest.mark.slow
def test_a_model_of_merged_tiles_trains_and_its_export_answers(world):
    workdir = world / "tiles"
    changes = {
        "model.image_aspect_ratio": "dynamic_s2",
        "model.s2_scales": "(32,64)",
        "model.max_tiles": 6,
        "data.images_per_group": 14,
        "data.seq_len": 192,
    }
    result = run(*arguments(world, workdir, num_steps=2, eval_every=2, **changes))
    assert result.returncode == 0, result.stderr
    assert len(losses(workdir)) == 2 and np.isfinite(list(losses(workdir).values())).all()
    heldout = [row for row in telemetry.read_metrics(workdir) if "heldout_swapped" in row]
    assert heldout and np.isfinite(heldout[-1]["heldout_swapped"])
    with vilam3_jax.load(workdir / "export") as assistant:
        grey = np.full((40, 70, 3), 90, np.uint8)
        assert isinstance(assistant.ask(grey, "What is this?", experts=False, max_new_tokens=2).answer, str)


def test_no_torch_after_tokenizer_step_and_generation(world, uninterrupted):
    """The JAX side does not load torch, although it is installed."""
    script = f"""
import sys
from pathlib import Path
import numpy as np
from PIL import Image
import vilam3_jax
from vilam3_jax import train
assert train.main({arguments(world, world / "no_torch", num_steps=1)!r}) == 0
Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save({str(world / "grey.png")!r})
assistant = vilam3_jax.load({str(uninterrupted / "export")!r})
reply = assistant.ask({str(world / "grey.png")!r}, "What is this?", experts=False)
assert isinstance(reply.answer, str)
loaded = {{m.split(".")[0] for m in sys.modules}}
assert "jax" in loaded
print(sorted(loaded & {{"torch", "transformers", "tensorflow", "vilam3_experts"}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "[]"
