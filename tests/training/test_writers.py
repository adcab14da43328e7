"""Writers of metrics: resumed runs, and errors of missing packages."""

import errno
import io
import json
import math
import os
import sys
import time

import pytest

from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError
from vilam3_jax.training import writers

from . import helpers


def config_with(*names, **settings):
    config = helpers.tiny_config()
    config.name = "stage3_instruct"
    config.telemetry.update(dict(writers=names, **settings))
    return config_lib.resolve(config)


def write_steps(config, workdir, start, last, offset=0.0):
    """A run that is killed after `last`; `offset` marks its values."""
    opened = writers.open_writers(config, workdir, start, started=time.time())
    for step in range(start + 1, last + 1):
        writers.write_all(opened, step, {"loss": step + offset, "grad_norm/llm": 1.0})
        if step % 2 == 0:
            writers.write_all(opened, step, {"heldout_true": 10.0 * step})
    for writer in opened:
        writer.close()


def test_json_lines_after_the_checkpoint_are_dropped_and_a_torn_one_is_no_line(tmp_path):
    write_steps(config_with(), tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write_steps(config_with(), tmp_path, 3, 6, offset=0.5)
    rows = writers.read_lines(tmp_path)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert [row["step"] for row in rows if "heldout_true" in row] == [2, 4, 6]


def test_a_new_run_in_an_old_folder_starts_its_figures_anew_but_not_its_first_start(tmp_path):
    write_steps(config_with(), tmp_path, 0, 5)
    first = writers.read_record(tmp_path)["first_start"]
    write_steps(config_with(), tmp_path, 0, 2)
    assert [row["step"] for row in writers.read_lines(tmp_path) if "loss" in row] == [1, 2]
    assert writers.read_record(tmp_path)["first_start"] == first


def test_damaged_files_are_named_or_lose_the_damaged_line(tmp_path):
    write_steps(config_with(), tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo\xff\xfe\n')
    assert [row["step"] for row in writers.read_lines(tmp_path) if "loss" in row] == [1, 2, 3]
    (tmp_path / "telemetry.json").write_text('{"first_')
    with pytest.raises(UserError, match=r"telemetry\.json: not readable.*remove it"):
        write_steps(config_with(), tmp_path, 0, 3)


def test_a_full_disk_is_one_line(tmp_path):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    lines = writers.JsonLines(tmp_path, writers.METRICS_FILE, 0)
    lines._file.close()
    lines._file = Full()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space"):
        lines.write(1, {"loss": 1.0})
    with pytest.raises(UserError, match="No space"):
        lines.close()
    assert lines._file.closed


def test_what_is_not_finite_is_null(tmp_path):
    lines = writers.JsonLines(tmp_path, writers.METRICS_FILE, 0)
    lines.write(1, {"loss": math.nan, "grad_norm": -math.inf, "skipped": 1})
    lines.close()
    text = (tmp_path / writers.METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "skipped": 1,
    }
    (row,) = writers.read_lines(tmp_path)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "skipped": 1}
    writers.JsonLines(tmp_path, writers.METRICS_FILE, 1).close()  # a resumed run keeps the line
    assert (tmp_path / writers.METRICS_FILE).read_text() == text


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize("start", [3, 0])
def test_tensorboard_shows_every_step_of_a_resumed_run_once(tmp_path, start):
    config = config_with("tensorboard")
    write_steps(config, tmp_path, 0, 5)
    write_steps(config, tmp_path, start, 6, offset=0.5)
    before = [(step, float(step)) for step in range(1, start + 1)]
    after = [(step, step + 0.5) for step in range(start + 1, 7)]
    assert scalars(tmp_path / "tensorboard", "loss") == before + after
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "heldout_true")] == [2, 4, 6]
    assert len(scalars(tmp_path / "tensorboard", "grad_norm/llm")) == 6


def test_mlflow_gets_every_step_of_a_resumed_run_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_with("mlflow")
    write_steps(config, tmp_path, 0, 5)
    write_steps(config, tmp_path, 3, 6, offset=0.5)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = json.loads((tmp_path / "telemetry.json").read_text())["mlflow"]
    losses = client.get_metric_history(run_id, "loss")
    assert sorted((one.step, one.value) for one in losses) == [(s, s + 0.5 * (s == 6)) for s in range(1, 7)]
    assert len(client.get_metric_history(run_id, "heldout_true")) == 3
    run = client.get_run(run_id)
    assert run.data.params["model.llm.num_layers"] == "2" and run.info.status == "FINISHED"


class FakeWandb:
    """Records what is sent, by the rules of the service: one run per id, steps never decrease."""

    def __init__(self):
        self.runs, self.errors = {}, type("errors", (), {"Error": RuntimeError})

    def init(self, **settings):
        self.settings = settings
        sent = self.runs.setdefault(settings["id"], [])
        outer = self

        class Run:
            def log(self, values, step):
                assert not sent or step >= sent[-1][0], "W&B drops steps that go back"
                sent.append((step, dict(values)))

            def finish(self):
                outer.finished = True

        return Run()


def test_wandb_gets_every_step_of_a_resumed_run_once(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = config_with("wandb", wandb_offline=True, project="ours")
    write_steps(config, tmp_path, 0, 5)
    write_steps(config, tmp_path, 3, 6, offset=0.5)
    (sent,) = fake.runs.values()
    assert [(step, values["loss"]) for step, values in sent if "loss" in values] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6.5)
    ]  # fmt: skip
    assert [step for step, values in sent if "heldout_true" in values] == [2, 4, 6]
    assert (fake.settings["mode"], fake.settings["project"], fake.finished) == ("offline", "ours", True)
    assert fake.settings["config"]["model"]["llm"]["num_layers"] == 2


def test_services_get_every_step_once_however_often_a_run_starts(tmp_path, monkeypatch):
    """Killed before the first checkpoint, after one, and soon after resuming from it."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start, last in ((0, 2), (0, 8), (4, 5), (4, 9)):
        write_steps(config_with("wandb"), tmp_path, start, last)
    (sent,) = fake.runs.values()
    assert [step for step, values in sent if "loss" in values] == list(range(1, 10))
    assert [step for step, values in sent if "heldout_true" in values] == [2, 4, 6, 8]


def test_wandb_of_a_run_in_an_object_store(bucket, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write_steps(config_with("wandb"), "gs://bucket/run", 0, 2)
    assert [step for step, values in next(iter(fake.runs.values())) if "loss" in values] == [1, 2]
    assert fake.settings["mode"] is None and not os.path.exists(fake.settings["dir"])
    with pytest.raises(UserError, match=r"gs://bucket/run.*local"):  # offline runs need a local folder
        write_steps(config_with("wandb", wandb_offline=True), "gs://bucket/run", 0, 2)


def test_what_was_not_sent_before_the_kill_is_sent_after_it(tmp_path, monkeypatch):
    """Killed during the evaluation of step 4, after its training metrics were sent."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = config_with("wandb")
    opened = writers.open_writers(config, tmp_path, 0, started=0.0)
    for step in range(1, 5):
        writers.write_all(opened, step, {"loss": float(step)})
    write_steps(config, tmp_path, 3, 4)
    (sent,) = fake.runs.values()
    assert [step for step, values in sent if "loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in sent if "heldout_true" in values] == [4]


def test_lines_in_an_object_store_that_cannot_append(bucket, monkeypatch):
    def steps():
        return [row["step"] for row in writers.read_lines("gs://bucket", "some.jsonl")]

    lines = writers.JsonLines("gs://bucket", "some.jsonl", 0)
    for step in (1, 2, 3):
        lines.write(step, {"loss": 1.0})
    assert steps() == [], "an upload a line would be refused"
    lines.flush()
    assert steps() == [1, 2, 3]
    monkeypatch.setattr(writers, "_REWRITE_SECONDS", 0)
    lines.write(4, {"loss": 1.0})
    assert steps() == [1, 2, 3, 4]  # and then the process is killed
    resumed = writers.JsonLines("gs://bucket", "some.jsonl", 2)
    assert steps() == [1, 2]
    resumed.write(3, {"loss": 1.0})
    resumed.close()
    assert steps() == [1, 2, 3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda _: None)
    writers.check(config_with().telemetry)
    with pytest.raises(UserError, match=rf"'{name}'.*pip install -e '\.\[{name}\]'"):
        writers.check(config_with(name).telemetry)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_services_that_need_a_local_folder_say_so(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"gs://bucket/run.*local"):
        writers._local("gs://bucket/run", name)
