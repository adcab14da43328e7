"""`launch/run.sh`: exit codes, and how SIGTERM is forwarded."""

import signal
import subprocess
import sys
import time

import pytest
from launchers import LAUNCH, launch

# Like `vilam3 train`: saves for a while after SIGTERM, then exits with the given code.
TRAINER = """
import signal, sys, time, threading
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
print("training", flush=True)
told.wait(30)
time.sleep(0.5)
print("saved", flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 1, 2, 75, 127, 255])
def test_exit_code_is_the_commands(code):
    assert launch("run.sh", "bash", "-c", f"exit {code}").returncode == code


def interrupted(code, sig, times=1):
    process = subprocess.Popen(
        [LAUNCH / "run.sh", sys.executable, "-c", TRAINER, str(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "training\n"
    for _ in range(times):
        process.send_signal(sig)
        time.sleep(0.1)
    rest, _ = process.communicate(timeout=120)
    return process.returncode, rest


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_saves_and_is_told_from_a_finished_one(sig):
    assert interrupted(0, sig) == (143, "saved\n")


def test_second_signal_does_not_end_the_saving():
    assert interrupted(0, signal.SIGTERM, times=3) == (143, "saved\n")


@pytest.mark.parametrize("code", [1, 2])
def test_failure_while_saving_is_not_hidden(code):
    assert interrupted(code, signal.SIGTERM) == (code, "saved\n")


def test_command_that_dies_of_the_signal():
    process = subprocess.Popen([LAUNCH / "run.sh", "sleep", "30"])
    time.sleep(0.3)
    process.terminate()
    assert process.wait(60) == 143


def test_arguments_arrive_as_they_are():
    done = launch("run.sh", "printf", "%s|", "a b", "", "$HOME", "'x'")
    assert done.stdout == "a b||$HOME|'x'|"


def test_no_command():
    done = launch("run.sh")
    assert done.returncode == 2
    assert "no command" in done.stderr
