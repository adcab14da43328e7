"""`launch/local.sh`: arguments, exit codes, signals; whole runs are in `test_processes`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"

# Stands in for the train program: `python -m vilam3_jax.train ARGUMENTS`.
PROGRAM = """#!/usr/bin/env bash
number=${*: -1}
number=${number#--process_id=}
echo "$*" >> "$SAID.$number"
trap 'echo TERM >> "$SAID.$number"; exit 0' TERM
trap 'echo INT >> "$SAID.$number"; exit 130' INT
case "$3$number" in
    ends*) exit 0 ;;
    fails1) exit 7 ;;
    stubborn1) exit 7 ;;
    stubborn0) trap "" TERM INT ;;
esac
for _ in $(seq 300); do sleep 0.1; done
"""


@pytest.fixture
def start(tmp_path):
    program = tmp_path / "python"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    finder = tmp_path / "finder"  # the real interpreter finds the port, the stand-in is the program
    finder.write_text(
        f'#!/usr/bin/env bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\nexec {program} "$@"\n'
    )
    finder.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(finder), "SAID": str(tmp_path / "said"), "GRACE_SECONDS": "2"}

    def start(*argv: str) -> subprocess.Popen:
        return subprocess.Popen([str(LOCAL), *argv], env=environment, stderr=subprocess.PIPE, text=True)

    return start


def said(tmp_path: Path, number: int) -> list[str]:
    file = tmp_path / f"said.{number}"
    return file.read_text().splitlines() if file.exists() else []


def test_processes_get_their_numbers_and_one_address(start, tmp_path):
    assert start("3", "ends", "--x=a b").wait(timeout=60) == 0
    lines = [said(tmp_path, number)[0].split() for number in range(3)]
    assert [line[-2:] for line in lines] == [["--num_processes=3", f"--process_id={n}"] for n in range(3)]
    assert len({line[-3] for line in lines}) == 1 and lines[0][-3].startswith(
        "--coordinator_address=localhost:"
    )
    assert lines[0][:5] == ["-m", "vilam3_jax.train", "ends", "--x=a", "b"]


@pytest.mark.parametrize("case", ["fails", "stubborn"])
def test_one_that_fails_ends_all(start, case):
    began = time.monotonic()
    assert start("2", case).wait(timeout=60) == 7
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("sent,code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_are_passed_on(start, tmp_path, sent, code):
    process = start("2", "waits")
    deadline = time.monotonic() + 60
    while not (said(tmp_path, 0) and said(tmp_path, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # past the traps of the stand-in
    process.send_signal(sent)
    assert process.wait(timeout=60) == code
    assert all(said(tmp_path, number)[-1] == sent.name[3:] for number in range(2))


@pytest.mark.parametrize("argv", [(), ("zero",), ("0",), ("--config=x",)])
def test_the_number_of_processes_comes_first(start, argv):
    process = start(*argv)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2 and "launch/local.sh 2 --config=" in message
