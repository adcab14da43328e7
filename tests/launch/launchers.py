"""Helpers that run the launchers."""

import atexit
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAIN = ["--config=configs/stage4_expert.py:vila_m3_8b", "--workdir=gs://bucket/stage4"]


@functools.cache
def basics():
    """A folder with standard programs, but without gcloud, kubectl, xpk, sbatch and docker."""
    folder = Path(tempfile.mkdtemp(prefix="vilam3-launch-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in (
        "bash",
        "cat",
        "cksum",
        "cut",
        "dirname",
        "env",
        "grep",
        "mktemp",
        "od",
        "printf",
        "rm",
        "sed",
        "wc",
        "seq",
        "sh",
        "sleep",
        "tr",
    ):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def launch(script, *arguments, path=None, **kwargs):
    """Runs `launch/<script>`, with only the programs in `path` and `basics` on PATH."""
    environment = {
        "PATH": f"{path}:{basics()}" if path else str(basics()),
        "HOME": os.environ.get("HOME", "/"),
    }
    command = [str(LAUNCH / script), *arguments]
    if script.endswith(".py"):
        command[:0] = [sys.executable, "-IS"]  # the standard library alone
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


def dry_run(script, *arguments, train=()):
    """The commands that a dry run prints, split by shell rules."""
    done = launch(script, *arguments, "--dry-run", *(["--", *train] if train else []))
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if line and not line.startswith("#")]


def refused(script, *arguments):
    """The one-line error message for a refused command line."""
    done = launch(script, *arguments)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ")
    return line


def flags(command):
    """Maps `--name=value` and `--name value` of a split command to name → value (True without a value)."""
    found = {}
    for index, word in enumerate(command):
        if match := re.fullmatch(r"--([\w-]+)(?:=(.*))?", word, re.DOTALL):
            following = command[index + 1] if index + 1 < len(command) else "--"
            found[match[1]] = (
                match[2] if match[2] is not None else (True if following.startswith("-") else following)
            )
    return found


def program(name):
    """A linter of the `dev` extra, next to this Python or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)
