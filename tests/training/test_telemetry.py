"""Metrics of the loop with slow devices and loaders, without blocking the loop."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vilam3_jax.configs import models

from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError
from vilam3_jax.models import model_config
from vilam3_jax.runtime import chips
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.tasks import TASKS
from vilam3_jax.tasks.task import Work
from vilam3_jax.training import flops, telemetry, writers
from vilam3_jax.training import program as program_lib
from vilam3_jax.training import step as step_lib
from vilam3_jax.training.watchdog import Watchdog

from . import helpers

_programs = {}


def program_of(config):
    """A cached program with settings of `config` that do not affect the build."""
    config = config_lib.resolve(config)
    if config.trainable not in _programs:
        mesh = mesh_lib.build_mesh(config.mesh, jax.devices()[:1])
        _programs[config.trainable] = program_lib.build(config, mesh)
    return dataclasses.replace(_programs[config.trainable], config=config)


def work_of(batch, task="generative"):
    return TASKS[task].work(model_config.resolve(models.get("tiny")), batch)


WORK = Work(*map(float, work_of(helpers.packed_batch(0))))  # of the batch of `follow`


class Device:
    """A device of known speed: the metrics of a step are ready `seconds` after those of the previous one."""

    def __init__(self, seconds):
        self.seconds, self._free = seconds, 0.0

    def run(self, step, batch):
        self._free = max(self._free, time.perf_counter()) + self.seconds
        return {
            name: Later(value, self._free)
            for name, value in {
                "loss": float(step),
                "learning_rate": 0.5,
                "skipped_in_row": 0.0,
                **WORK._asdict(),
            }.items()
        }


class Later:
    """A value that is ready at a given time."""

    def __init__(self, value, ready):
        self._value, self._ready = value, ready

    def block_until_ready(self):
        time.sleep(max(0.0, self._ready - time.perf_counter()))
        return self

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.asarray(self._value)

    def __float__(self):
        self.block_until_ready()
        return float(self._value)


@pytest.fixture(autouse=True)
def read_later(monkeypatch):
    """Makes `jax.device_get` accept `Later`."""
    get = jax.device_get

    def device_get(tree):
        return get(jax.tree.map(lambda x: float(x) if isinstance(x, Later) else x, tree))

    monkeypatch.setattr(telemetry.jax, "device_get", device_get)


def follow(tmp_path, steps, device, *, load=0.0, config=None, start=0, clock=None, each=lambda *_: None):
    """Runs a loop as `train` does; returns the logged rows and the clock."""
    config = config or helpers.tiny_config()
    config.num_steps = steps
    config.trainable = ((r"llm/.*", 1.0), (r"projector/.*", 0.5), (r"vision_tower/.*", 0.0))
    program = program_of(config)
    batch = helpers.packed_batch(0)
    clock = clock or telemetry.Clock()
    with telemetry.Telemetry(
        program, tmp_path, start, clock, started=time.time(), last=steps, quiet=True
    ) as monitor:
        for step in range(start + 1, steps + 1):
            with monitor.input():
                time.sleep(load)
            with monitor.step(step):
                metrics = device.run(step, batch)
            monitor.dispatched(step, batch, metrics)
            each(monitor, step)
        monitor.flush()
    return [row for row in writers.read_lines(tmp_path) if "loss" in row], clock


def test_speed_counts_all_steps_since_the_last_log_in_the_devices_own_time(tmp_path):
    config = helpers.tiny_config()
    config.log_every = 4
    rows, clock = follow(tmp_path, 10, Device(0.05), config=config)
    assert [row["step"] for row in rows] == [4, 8, 10]
    tokens = int((helpers.packed_batch(0).segment_ids > 0).sum())
    assert [row["tokens"] for row in rows] == [4 * tokens, 8 * tokens, 10 * tokens]
    assert clock.tokens == 10 * tokens
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(tokens / 0.05, rel=0.3)
        assert row["input_wait"] < 0.2
    assert clock.productive == pytest.approx(0.5, rel=0.25)


def test_the_loop_runs_ahead_of_the_device_but_not_far(tmp_path):
    ahead = []

    def note(monitor, step):
        done = step - monitor._queue.qsize()
        ahead.append(step - done)

    began = time.perf_counter()
    follow(tmp_path, 6, Device(0.1), each=note)
    assert time.perf_counter() - began > 0.6
    assert max(ahead) == telemetry._AHEAD


def test_input_that_is_slower_than_the_device_is_waited_for(tmp_path):
    rows, clock = follow(tmp_path, 8, Device(0.05), load=0.15)
    later = rows[2:]
    # A batch arrives every 150 ms; the device is busy for 50 ms of them.
    assert all(row["input_wait"] == pytest.approx(2 / 3, abs=0.15) for row in later)
    assert clock.productive == pytest.approx(8 * 0.05, rel=0.3)


def test_input_that_is_hidden_behind_the_device_is_no_wait(tmp_path):
    rows, _ = follow(tmp_path, 8, Device(0.12), load=0.06)
    assert all(row["input_wait"] < 0.1 for row in rows[2:])


def test_what_is_no_step_is_left_out_of_the_speed_and_logged(tmp_path):
    def pause(monitor, step):
        if step == 3:
            with monitor.pause("checkpoint_stall"):
                time.sleep(2.0)

    rows, clock = follow(tmp_path, 6, Device(0.5), each=pause)
    tokens = int((helpers.packed_batch(0).segment_ids > 0).sum())
    # Including the pause a step would take 2.5 s. On a busy machine steps may end late, and the next early.
    assert all(tokens / 2.0 < row["tokens_per_second"] < 1.5 * tokens / 0.5 for row in rows)
    (stall,) = [row for row in writers.read_lines(tmp_path) if "checkpoint_stall" in row]
    assert stall["step"] == 3 and stall["checkpoint_stall"] >= 2.0
    assert clock.seconds > 4.5 and clock.productive <= clock.seconds - stall["checkpoint_stall"]


def test_goodput_survives_a_restart_and_loses_what_was_not_saved(tmp_path):
    (tmp_path / writers.RECORD_FILE).write_text(json.dumps({"first_start": time.time() - 100}))
    rows, _ = follow(tmp_path, 4, Device(0.05), clock=telemetry.Clock(productive=50.0, seconds=80.0))
    assert rows[-1]["goodput"] == pytest.approx(0.5, abs=0.02)
    assert rows[-1]["seconds"] > 80
    # Killed; the checkpoint of step 2 has 40 productive seconds.
    rows, _ = follow(tmp_path, 4, Device(0.05), start=2, clock=telemetry.Clock(productive=40.0))
    assert rows[-1]["goodput"] == pytest.approx(0.4, abs=0.02)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_clock_of_an_older_checkpoint_is_read():
    assert telemetry.Clock.of({"tokens": 7, "seconds": 2.5}) == telemetry.Clock(7, 2.5, 0.0)


def test_an_error_on_the_device_or_in_a_writer_reaches_the_loop(tmp_path):
    class Broken(Later):
        def block_until_ready(self):
            raise FloatingPointError("the device failed")

    class BrokenDevice(Device):
        def run(self, step, batch):
            return super().run(step, batch) | ({"loss": Broken(0.0, 0.0)} if step == 2 else {})

    with pytest.raises(FloatingPointError, match="the device failed"):
        follow(tmp_path, 20, BrokenDevice(0.01))
    assert not [thread for thread in threading.enumerate() if thread.name == "vilam3-telemetry"]


def test_a_writer_that_fails_at_the_end_keeps_none_from_closing(tmp_path, monkeypatch):
    closed = []

    def failing(self):
        raise UserError("metrics.jsonl: cannot be written")

    class Other(writers.JsonLines):
        def close(self):
            closed.append(self)

    monkeypatch.setattr(writers, "open_writers", lambda *_: [first, Other(tmp_path, "other.jsonl", 0)])
    first = writers.JsonLines(tmp_path, writers.METRICS_FILE, 0)
    monkeypatch.setattr(first, "close", failing.__get__(first))
    with pytest.raises(UserError, match="cannot be written"):
        follow(tmp_path, 2, Device(0.01))
    assert len(closed) == 1

    def broken(*_):
        raise KeyError("of the loop")

    with pytest.raises(KeyError, match="of the loop"):  # the error that ended the run has priority
        follow(tmp_path, 2, Device(0.01), each=broken)
    assert len(closed) == 2


def test_learning_rates_by_group(tmp_path):
    rows, _ = follow(tmp_path, 1, Device(0.01))
    assert rows[0]["learning_rate/llm"] == 0.5 and rows[0]["learning_rate/projector"] == 0.25
    assert "learning_rate/vision_tower" not in rows[0]
    rates = {"llm/x/lora_a": 1.0, "llm/norm": 0.1, "llm/kernel": 0.0, "projector/k": 3.0}
    assert telemetry.lr_by_group(rates) == {"llm_x0.1": 0.1, "llm_x1": 1.0, "projector": 3.0}


def test_packing_efficiency_of_every_step(tmp_path):
    rows, _ = follow(tmp_path, 1, Device(0.01))
    batch = helpers.packed_batch(0)
    assert rows[0]["token_fill"] == pytest.approx((batch.segment_ids > 0).mean())
    assert rows[0]["image_fill"] == 1.0


@pytest.mark.parametrize("task", ["generative", "contrastive"])
def test_work_counted_on_the_device_is_that_of_the_accounting(task):
    if task == "generative":
        batch = helpers.packed_batch(3)
        batch.image_valid[0, 1] = False
        lengths = np.asarray([[(row == n).sum() for n in (1, 2)] for row in batch.segment_ids])
        want = Work(lengths.sum(), (batch.loss_weights != 0).sum(), 15, (lengths**2).sum() / 2)
    else:
        batch = helpers.pair_batch(3)
        batch.text_valid[2] = False
        lengths = batch.text_valid.sum(axis=1)
        want = Work(lengths.sum(), 0, 7, (lengths**2).sum())
    counted = jax.jit(lambda batch: work_of(batch, task))(batch)
    assert tuple(map(float, counted)) == want


def test_mfu_is_the_share_of_the_peak_and_absent_on_a_cpu(monkeypatch):
    program = program_of(helpers.tiny_config())
    per_unit = flops.model_flops(program.task, program.config.model, program.shapes, program.lr_multipliers)
    needed = flops.step_flops(per_unit, WORK)
    speed = telemetry.Speed(program).of(WORK, 2.0)
    assert set(speed) == {"tflops_per_device"}
    assert speed["tflops_per_device"] == pytest.approx(needed / 2 / jax.device_count() / 1e12)
    monkeypatch.setattr(telemetry.chips, "of_kind", lambda kind: chips.CHIPS["tpu7x"])
    found = telemetry.Speed(program).of(WORK, 2.0)
    assert found["mfu"] == pytest.approx(needed / 2 / jax.device_count() / (2307e12 / 2))


def test_norms_of_components_add_up():
    rng = np.random.default_rng(0)
    grads = {
        path: jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
        for path in ("llm/a", "llm/b/c", "projector/k", "vision_tower/k")
    }
    norms = step_lib.component_norms(grads)
    assert set(norms) == {"grad_norm/llm", "grad_norm/projector", "grad_norm/vision_tower"}
    whole = np.concatenate([np.asarray(grads["llm/a"]).ravel(), np.asarray(grads["llm/b/c"]).ravel()])
    np.testing.assert_allclose(norms["grad_norm/llm"], np.linalg.norm(whole), rtol=1e-6)
    total = np.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
    np.testing.assert_allclose(
        total, np.linalg.norm(np.concatenate([np.asarray(g).ravel() for g in grads.values()])), rtol=1e-6
    )


# --- the watchdog


def test_a_stall_leaves_the_stacks_of_all_threads_and_goes_on(tmp_path, caplog):
    watchdog = Watchdog(tmp_path, 0.4)
    for _ in range(4):
        time.sleep(0.2)
        watchdog.beat()
    file = tmp_path / "stacks-0.txt"
    assert not file.read_text()

    def a_function_that_hangs():
        time.sleep(1.2)

    a_function_that_hangs()
    said = file.read_text()
    assert ("a_function_that_hangs" in said and "vilam3-watchdog" in said) or "_watch" in said
    assert said.count("no step for") == 1
    assert str(file) in caplog.text
    watchdog.beat()
    time.sleep(0.1)
    watchdog.close()
    assert file.exists()


def test_a_stall_before_the_first_step_is_said_too(tmp_path, caplog):
    watchdog = Watchdog(tmp_path, 0.2)
    time.sleep(1.0)
    watchdog.close()
    assert (tmp_path / "stacks-0.txt").read_text().count("no step for") == 1
    assert "no step for" in caplog.text


def test_a_run_without_a_stall_leaves_no_file(tmp_path):
    Watchdog(tmp_path, 60.0).close()
    Watchdog(tmp_path, 0.0).close()
    assert not list(tmp_path.iterdir())


def test_a_thread_that_keeps_the_interpreters_lock_is_shown_too(tmp_path):
    """A regular expression with exponential backtracking runs for minutes and keeps the GIL."""
    script = f"""
import re, sys
from vilam3_jax.training.watchdog import Watchdog
Watchdog({str(tmp_path)!r}, 0.5)
def stuck():
    re.match(r"(a+)+b", "a" * 60)
stuck()
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 60
        file = tmp_path / "stacks-0.txt"
        while time.monotonic() < deadline and not (file.exists() and "stuck" in file.read_text()):
            time.sleep(0.1)
        assert "in stuck" in file.read_text()
    finally:
        process.kill()
        process.wait()


# --- traces


def traced(folder):
    return len(list(folder.rglob("*.xplane.pb")))


def test_traces_of_the_steps_that_the_config_names_and_on_a_signal(tmp_path):
    config = helpers.tiny_config()
    config.telemetry.profile_steps = (2, 3)
    seen = {}

    def each(monitor, step):
        seen[step] = traced(tmp_path)
        if step == 5:
            signal.raise_signal(signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    follow(tmp_path, 10, Device(0.3), config=config, each=each)
    assert [seen[step] for step in range(1, 11)] == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").touch()
    config = helpers.tiny_config()
    config.telemetry.profile_steps = (2, 3)
    rows, _ = follow(tmp_path, 4, Device(0.01), config=config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert f"{tmp_path / 'profile'}: no trace (" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"telemetry.writers": ("tensorbord",)}, "tensorbord.*tensorboard"),
        ({"telemetry.profile_steps": (3,)}, "profile_steps"),
        ({"telemetry.profile_steps": (5, 3)}, "profile_steps"),
        ({"telemetry.profile_steps": ("a", "b")}, "profile_steps"),
        ({"telemetry.writers": (1,)}, "writers names 1"),
        ({"telemetry.stall_seconds": -1.0}, "stall_seconds"),
        ({"log_every": 0}, "log_every"),
        ({"eval_generate": 4}, "eval_generate.*eval_every"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        config_lib.load("configs/stage3_instruct.py:tiny", change)
