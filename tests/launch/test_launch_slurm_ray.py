"""`launch/slurm_ray.sh`: the batch job, its Ray cluster, and its behaviour on interruptions."""

import json
import re
import shlex
import stat
import sys

import pytest
from launchers import flags, launch, refused

ANNOTATE = ["--expert=CXR", "--data=/shared/films", "--out=/shared/annotations"]
SIZE = ["--nodes=4", "--gpus-per-node=8", "--cpus-per-node=64", "--time=12:00:00"]


def batch(*arguments, annotate=ANNOTATE):
    done = launch("slurm_ray.sh", *SIZE, *arguments, "--dry-run", "--", *annotate)
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert (first, last) == ("sbatch <<'BATCH'", "BATCH")
    return lines


def command(lines, beginning):
    text = "\n".join(lines).replace("\\\n", " ")
    return shlex.split(re.search(rf"^{beginning}.*$", text, re.MULTILINE)[0])


def test_what_it_asks_for():
    lines = batch("--partition=h100")
    given = flags([word for line in lines if line.startswith("#SBATCH ") for word in line.split()[1:]])
    assert (given["nodes"], given["ntasks-per-node"], given["gpus-per-node"]) == ("4", "1", "8")
    assert (given["cpus-per-task"], given["partition"]) == ("64", "h100")
    assert given["signal"] == "B:USR1@120"  # to the script; TERM is left for scancel
    assert given["requeue"] is True and given["no-kill"] is True  # Ray survives the loss of a node
    nodes = command(lines, "srun")
    assert "--gpu-bind=none" in nodes and "--cpus-per-task=64" in nodes
    assert "--num-gpus=8" in nodes and "--num-cpus=64" in nodes
    driver = command(lines, ".*vilam3_experts annotate")
    assert driver[2:8] == ["vilam3_experts", "annotate", *ANNOTATE, "--engine=ray"]
    assert "gpus-per-node" not in "\n".join(batch("--gpus-per-node=0"))


def test_awkward_words_arrive():
    lines = batch("--env=A=b c'd", annotate=[*ANNOTATE, '--args=it\'s "x" $HOME'])
    assert '--args=it\'s "x" $HOME' in command(lines, ".*vilam3_experts annotate")
    (export,) = [line for line in lines if line.startswith("export") and "A=" in line]
    assert shlex.split(export) == ["export", "A=b c'd"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--nodes="], "--nodes="),
        (["--gpus-per-node=x"], "--gpus-per-node=x"),
        (["--cpus-per-node=0"], "--cpus-per-node=0"),
        (["--time=soon"], "--time=soon"),
        (["--time=2"], "longer than the 120 seconds"),
        (["--partition=a b"], "--partition=a b"),
        (["--env=A"], "KEY=VALUE"),
        (["4"], "no such option"),
    ],
)
def test_bad_arguments(change, told):
    assert told in refused("slurm_ray.sh", *SIZE, *change, "--dry-run", "--", *ANNOTATE)


@pytest.mark.parametrize(
    ("annotate", "told"),
    [
        ([], "--expert=NAME"),
        (ANNOTATE[:2], "--out="),
        ([*ANNOTATE[:2], "--out=out"], "absolute path"),
        ([*ANNOTATE[:2], "--out=/tmp/out"], "/tmp is local to each node"),
        ([*ANNOTATE, "--weights", "w"], "--weights=w"),
        ([*ANNOTATE, "--engine=ray"], "omit it after --; the launcher sets it"),
    ],
)
def test_bad_arguments_of_annotate(annotate, told):
    assert told in refused("slurm_ray.sh", *SIZE, "--dry-run", "--", *annotate)


# A fake Slurm of one node: sbatch runs the job at once and after each requeue; srun runs one task.
SLURM = """#!{python} -IS
import os, pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
name = pathlib.Path(__file__).name
queued = here / "queued"
if name == "scontrol":
    assert sys.argv[1:] == ["requeue", "77"]
    queued.touch()
elif name == "srun":
    words = sys.argv[1:]
    while words[0].startswith("-"):
        words.pop(0)
    os.execvp(words[0], words)
elif name == "sbatch":
    script = sys.stdin.read()
    for turn in range(9):
        queued.unlink(missing_ok=True)
        environment = os.environ | {{"SLURM_JOB_ID": "77", "SLURMD_NODENAME": "node7"}}
        code = subprocess.run(["bash", "-c", script], env=environment).returncode
        print("turn", turn, "ended with", code, flush=True)
        if not queued.exists():
            break
"""
# Ray's nodes run until they are terminated. The driver ends as `turns` says, one word per turn: a code,
# `limit` (the signal before the time limit) or `taken` (scancel).
PYTHON = """#!{python} -IS
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as file:
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    file.write(json.dumps([sys.argv[1:], os.environ.get("RAY_AUTH_MODE"), token]) + "\\n")
if "ray.scripts.scripts" in sys.argv:
    time.sleep(60)
    sys.exit(9)
now, *rest = (here / "turns").read_text().split()
(here / "turns").write_text("\\n".join(rest))
if now.isdigit():
    sys.exit(int(now))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.kill(os.getppid(), signal.SIGUSR1 if now == "limit" else signal.SIGTERM)
time.sleep(20)
"""


@pytest.mark.parametrize(
    ("turns", "ends"),
    [
        ("0", [0]),
        ("limit limit limit 0", [143, 143, 143, 0]),  # more often than --retries
        ("2 0", [2]),  # a user error
        ("1 0", [1, 0]),  # a crash or an I/O error
        ("taken 0", [143]),  # scancel: not requeued
        ("1 limit 1 1 0", [1, 143, 1, 1]),  # --retries=2
    ],
)
def test_job_queues_again_until_all_is_annotated(tmp_path, turns, ends):
    for name in ("sbatch", "srun", "scontrol", "python"):
        (tmp_path / name).write_text((PYTHON if name == "python" else SLURM).format(python=sys.executable))
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "turns").write_text(turns)
    done = launch(
        "slurm_ray.sh", *SIZE, "--retries=2", f"--python={tmp_path}/python", "--", *ANNOTATE,
        path=tmp_path, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(code) for code in re.findall(r"turn \d ended with (\d+)", done.stdout)] == ends
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    drivers = [argv for argv, _, _ in calls if "annotate" in argv]
    assert len(drivers) == len(ends)
    assert all(argv[-2:] == ["--engine=ray", "--address=node7:20077"] for argv in drivers)
    assert {mode for _, mode, _ in calls} == {"token"}
    tokens = {token for _, _, token in calls}
    assert len(tokens) == len(ends) and all(len(token) == 64 for token in tokens)  # a new token for each turn
