"""The lock of a run's folder, and the list of skipped records."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.training.helpers import tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax import train
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import workdir

HOLD = """
import sys
from vilam3_jax.runtime import workdir
with workdir.claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def test_a_second_run_is_refused_and_the_first_is_named(tmp_path, holder, monkeypatch, caplog):
    monkeypatch.setattr(workdir, "WAIT_SECONDS", 0.5)
    caplog.set_level("INFO", logger="vilam3_jax")
    refused = pytest.raises(UserError, match=f"process {holder.pid} of .* runs here")
    with refused as told, workdir.claimed(tmp_path):
        raise AssertionError("two runs in one folder")
    assert str(tmp_path) in str(told.value) and "waiting for its end" in caplog.text
    with workdir.claimed(tmp_path / "other"):
        pass


def test_a_killed_run_leaves_its_folder_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):
        with workdir.claimed(tmp_path):
            pass


def test_a_run_waits_for_one_that_ends(tmp_path, holder, monkeypatch):
    waited = []

    def end_the_first(seconds):
        waited.append(holder.communicate())

    monkeypatch.setattr(workdir.time, "sleep", end_the_first)
    with workdir.claimed(tmp_path):
        assert len(waited) == 1


def test_training_claims_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "WAIT_SECONDS", 0.5)
    refused = pytest.raises(UserError, match=f"process {os.getpid()} of .* runs here")
    with workdir.claimed(tmp_path), refused:
        train.train(config_lib.resolve(tiny_config()), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [workdir.CLAIM_FILE]


def test_a_folder_is_claimed_from_a_colleague_whose_file_one_may_only_read(tmp_path, monkeypatch):
    modes, open_as = [], os.open

    def reading_only(path, flags, mode=0o777):
        modes.append(mode)
        if flags & os.O_RDWR and os.path.exists(path):
            raise PermissionError(13, "Permission denied", path)
        return open_as(path, flags, mode)

    monkeypatch.setattr(workdir, "WAIT_SECONDS", 0.5)
    with workdir.claimed(tmp_path):
        monkeypatch.setattr(workdir.os, "open", reading_only)
        with pytest.raises(UserError, match="runs here"), workdir.claimed(tmp_path):
            raise AssertionError("two runs in one folder")
    with workdir.claimed(tmp_path):
        assert modes[0] == 0o666  # the umask decides who may write


def test_records_skipped_are_named_across_restarts(tmp_path, monkeypatch):
    first = workdir.SkippedRecords(tmp_path)
    assert first.add([]) == {} and not (tmp_path / workdir.SKIPPED_FILE).exists()
    assert first.add([("a/train record 1", "torn")]) == {"records_skipped": 1}
    again = workdir.SkippedRecords(tmp_path)
    assert again.add([("a/train record 1", "torn"), ("b/train record 2", "too long")]) == {
        "records_skipped": 2
    }
    named = json.loads((tmp_path / workdir.SKIPPED_FILE).read_text())
    assert named == {"a/train record 1": "torn", "b/train record 2": "too long"} == again.records
    sent = []
    monkeypatch.setattr(workdir.processes, "gather", lambda new: sent.append(new) or [new])
    three = [("a/train record 1", "torn"), ("b/train record 2", "too long"), ("c", "torn")]
    assert again.add(three) == again.add(three) == {"records_skipped": 3}
    assert sent == [[three[2:], 0], [[], 0]]  # each record is sent once
    assert again.add(three, 5) == {"records_skipped": 3, "annotations_missing": 5}
    (tmp_path / workdir.SKIPPED_FILE).write_text('{"a')
    with pytest.raises(UserError, match=r"skipped_records\.json: not readable"):
        workdir.SkippedRecords(tmp_path)
