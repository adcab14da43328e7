"""`launch/slurm_gpu.sh`: the batch job, and its behaviour on interruptions."""

import re
import shlex
import stat
import sys

import pytest
from launchers import LAUNCH, flags, launch, refused

TRAIN = ["--config=configs/stage4_expert.py:vila_m3_8b", "--workdir=/shared/stage4"]
SIZE = ["--nodes=4", "--gpus-per-node=8", "--time=12:00:00"]


def batch(*arguments, train=TRAIN):
    done = launch("slurm_gpu.sh", *SIZE, *arguments, "--dry-run", "--", *train)
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert (first, last) == ("sbatch <<'BATCH'", "BATCH")
    assert lines[0] == "#!/bin/bash"
    return lines


def directives(lines):
    return flags([word for line in lines if line.startswith("#SBATCH ") for word in line.split()[1:]])


def srun(lines):
    text = "\n".join(lines).replace("\\\n", " ")
    return shlex.split(re.search(r"^srun .*$", text, re.MULTILINE)[0])


def test_one_process_a_gpu():
    lines = batch("--partition=h100", "--account=lab", "--cpus-per-process=12")
    given = directives(lines)
    assert given["nodes"] == "4"
    assert given["ntasks-per-node"] == given["gpus-per-node"] == "8"
    assert given["cpus-per-task"] == "12"
    assert given["time"] == "12:00:00"
    assert given["signal"] == "TERM@300"  # to the trainers, not to the script ("B:")
    assert given["requeue"] is True
    assert (given["partition"], given["account"]) == ("h100", "lab")
    assert "qos" not in given
    command = srun(lines)
    # A task must see all GPUs of its node; JAX picks one by SLURM_LOCALID.
    assert "--gpu-bind=none" in command
    assert "--cpus-per-task=12" in command  # not inherited from sbatch since Slurm 22.05
    assert not [word for word in command if word.startswith("--gpus-per-task")]
    assert "--kill-on-bad-exit=0" in command
    begin = command.index(str(LAUNCH / "run.sh"))
    assert command[begin + 2 :] == ["-m", "vilam3_jax.cli", "train", *TRAIN]
    assert not [line for line in lines if "JAX_LOCAL_DEVICE_IDS" in line]
    assert "export JAX_COMPILATION_CACHE_DIR=/shared/stage4/compile_cache" in lines


def test_no_time_limit():
    assert directives(batch("--time=0"))["time"] == "0"


def test_one_process_a_node():
    lines = batch("--processes=node")
    assert directives(lines)["ntasks-per-node"] == "1"
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7" in lines


@pytest.mark.parametrize("processes, local", [("gpu", [3]), ("node", [0, 1, 2, 3, 4, 5, 6, 7])])
def test_jax_understands_what_slurm_tells(processes, local, monkeypatch):
    """JAX's cluster detection in the environment of task 3 of a node, with the exports of the batch job."""
    clusters = pytest.importorskip("jax._src.clusters")
    environment = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[03-06]", "SLURM_NTASKS": "32", "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
    }  # fmt: skip
    for line in batch(f"--processes={processes}"):
        if line.startswith("export JAX_"):
            key, value = shlex.split(line)[1].split("=", 1)
            environment[key] = value
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    given = environment.get("JAX_LOCAL_DEVICE_IDS")
    address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, [int(i) for i in given.split(",")] if given else None, None, 60
    )
    assert address.startswith("gpu03:")
    assert (count, index, list(devices)) == (32, 11, local)


def test_awkward_words_arrive():
    lines = batch("--env=A=b c'd", train=[*TRAIN, '--config.name=it\'s "x" $HOME'])
    assert srun(lines)[-1] == '--config.name=it\'s "x" $HOME'
    (export,) = [line for line in lines if line.startswith("export") and "A=" in line and "CACHE" not in line]
    assert shlex.split(export) == ["export", "A=b c'd"]


@pytest.mark.parametrize(
    "change, told",
    [
        (["--nodes="], "--nodes="),
        (["--nodes=two"], "--nodes=two"),
        (["--gpus-per-node=0"], "--gpus-per-node=0"),
        (["--time=soon"], "--time=soon"),
        *(
            (["--time=" + limit], "longer than the 300 seconds")
            for limit in ("5", "4:59", "0:05:00", "0-0:05")
        ),
        (["--processes=chip"], "gpu or node"),
        (["--partition=a b"], "--partition=a b"),
        (["--job-name="], "--job-name="),
        (["--env=A"], "KEY=VALUE"),
        (["--compile-cache=cache"], "absolute path"),
        (["--nodes"], "no such option"),
        (["4"], "no such option"),
    ],
)
def test_bad_arguments(change, told):
    assert told in refused("slurm_gpu.sh", *SIZE, *change, "--dry-run", "--", *TRAIN)


@pytest.mark.parametrize(
    "train, told",
    [
        ([], "after --"),
        (["--workdir=/shared/x"], "--config=FILE"),
        (["--config=a"], "--workdir="),
        (["--config=a", "--workdir=runs/x"], "absolute path"),
        ([*TRAIN, "--config.data.path", "data"], "--config.data.path=data"),
        (["--config=a", "--workdir=/tmp/x"], "/tmp is local to each node"),
        ([*TRAIN, "--config.data.path=data"], "--config.data.path=data"),
        ([*TRAIN, "--config.init.everything=export"], "--config.init.everything=export"),
    ],
)
def test_bad_arguments_of_the_trainer(train, told):
    assert told in refused("slurm_gpu.sh", *SIZE, "--dry-run", "--", *train)


def test_programs_are_needed_to_submit():
    assert "sbatch is not installed" in refused("slurm_gpu.sh", *SIZE, "--", *TRAIN)


# A fake Slurm of one node: sbatch runs the job at once and after each requeue; srun runs one task.
SLURM = """#!{python} -IS
import os, pathlib, signal, subprocess, sys
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
    sys.exit(subprocess.call(words))
elif name == "sbatch":
    script = sys.stdin.read()
    for turn in range(9):
        queued.unlink(missing_ok=True)
        environment = os.environ | {{"SLURM_JOB_ID": "77"}}
        if turn:
            environment["SLURM_RESTART_COUNT"] = str(turn)
        code = subprocess.run(["bash", "-c", script], env=environment).returncode
        print("turn", turn, "ended with", code, flush=True)
        if not queued.exists():
            break
"""
# Ends as `turns` says, one word per turn: a code, `told` (SIGTERM to the trainer), `taken` (also to the job).
TRAINER = """#!{python} -IS
import os, pathlib, signal, sys, time
file = pathlib.Path(__file__).parent / "turns"
now, *rest = file.read_text().split()
file.write_text("\\n".join(rest))
if now.isdigit():
    sys.exit(int(now))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
run = os.getppid()
if now == "taken":
    srun = int(pathlib.Path(f"/proc/{{run}}/stat").read_text().split()[3])
    batch = int(pathlib.Path(f"/proc/{{srun}}/stat").read_text().split()[3])
    os.kill(batch, signal.SIGTERM)
os.kill(run, signal.SIGTERM)
time.sleep(20)
"""


@pytest.mark.parametrize(
    "turns, ends",
    [
        ("0", [0]),
        ("told told told told 0", [143, 143, 143, 143, 0]),  # the time limit, more often than --retries
        ("2 0", [2]),  # a user error
        ("134 0", [134, 0]),  # a crash
        ("taken 0", [143]),  # scancel: not requeued
        ("1 told 1 told 1 1", [1, 143, 1, 143, 1]),  # --retries=2
    ],
)
def test_job_queues_again_until_it_is_finished(tmp_path, turns, ends):
    for name in ("sbatch", "srun", "scontrol", "python"):
        (tmp_path / name).write_text((TRAINER if name == "python" else SLURM).format(python=sys.executable))
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "turns").write_text(turns)
    done = launch(
        "slurm_gpu.sh",
        *SIZE,
        "--retries=2",
        f"--python={tmp_path}/python",
        "--",
        *TRAIN,
        path=tmp_path,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [int(code) for code in re.findall(r"turn \d ended with (\d+)", done.stdout)] == ends
