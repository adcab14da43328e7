"""`launch/tpu_vm.sh`: dry runs, and the loop of `up` against a fake Google Cloud."""

import re
import shlex
import shutil
import stat
import subprocess

import pytest
from launchers import TRAIN, dry_run, flags, launch, refused

WHERE = ["--name=m3", "--project=my-project", "--zone=us-east5-a"]
IMAGE = "--image=us-east5-docker.pkg.dev/my-project/vilam3/trainer:1"
UP = ["up", *WHERE, IMAGE, "--accelerator-type=v5p-128"]
GCLOUD = ["gcloud", "compute", "tpus", "queued-resources"]


def test_up_asks_waits_trains_follows_and_deletes():
    commands = dry_run("tpu_vm.sh", *UP, "--spot", train=TRAIN)
    assert [command[:4] for command in commands] == [GCLOUD] * 5
    assert [command[4] for command in commands] == ["create", "describe", "ssh", "ssh", "delete"]
    assert {command[5] for command in commands} == {"m3"}
    for command in commands:
        assert flags(command)["project"] == "my-project"
        assert flags(command)["zone"] == "us-east5-a"
    create = flags(commands[0])
    assert create["accelerator-type"] == "v5p-128"
    assert create["runtime-version"] == "v2-alpha-tpuv5"
    assert create["node-id"] == "m3"
    assert create["spot"] is True
    assert "node-count" not in create
    assert flags(commands[4])["force"] is True


def test_several_slices():
    create, _, start, *_ = dry_run("tpu_vm.sh", *UP, "--slices=4", "--valid-until-duration=6h", train=TRAIN)
    assert flags(create)["node-count"] == "4"
    assert flags(create)["node-prefix"] == "m3"
    assert flags(create)["valid-until-duration"] == "6h"
    assert "node-id" not in flags(create)
    assert "JAX_COORDINATOR_PORT=8476" in flags(start)["command"]


@pytest.mark.parametrize(
    "accelerator, runtime, chips",  # runtimes: cloud.google.com/tpu/docs/runtimes
    [
        ("v5litepod-256", "v2-alpha-tpuv5-lite", 256),
        ("v6e-256", "v2-alpha-tpuv6e", 256),
        ("v5p-8", "v2-alpha-tpuv5", 4),
        ("v5p-512", "v2-alpha-tpuv5", 256),
        ("v4-64", "tpu-ubuntu2204-base", 32),
    ],
)
def test_runtime_and_chips(accelerator, runtime, chips):
    done = launch(
        "tpu_vm.sh", "create", *WHERE, f"--accelerator-type={accelerator}", "--slices=2", "--dry-run"
    )
    assert flags(shlex.split(done.stdout))["runtime-version"] == runtime
    assert f"{2 * chips} chips" in done.stderr


def container(command):
    """The split `docker run` command on the workers, and the script that contains it."""
    script = flags(command)["command"]
    return shlex.split(script[script.index("sudo docker run") :]), script


def test_trainer_on_every_worker():
    awkward = "--config.data.mixture=(('it''s', 0.5), (\"b $HOME\", 1))"
    (command,) = dry_run("tpu_vm.sh", "train", *WHERE, IMAGE, "--env=A=b c", train=[*TRAIN, awkward])
    assert flags(command)["node"] == flags(command)["worker"] == "all"
    docker, script = container(command)
    given = flags(docker)
    assert given["shm-size"] == "32g"
    assert given["ulimit"] == "memlock=-1"
    assert given["network"] == "host"
    assert given["stop-timeout"] == "300"
    assert "--env=JAX_COMPILATION_CACHE_DIR=gs://bucket/stage4/compile_cache" in docker
    assert "--env=A=b c" in docker
    assert docker[docker.index("vilam3") - 1] == IMAGE.removeprefix("--image=")
    assert docker[docker.index("vilam3") :] == ["vilam3", "train", "--distributed", *TRAIN, awkward]
    assert "sudo gcloud auth configure-docker us-east5-docker.pkg.dev" in script


@pytest.mark.parametrize(
    "change, told",
    [
        (["--name=M3"], "--name=M3"),
        (["--name="], "--name="),
        (["--project=x"], "--project=x"),
        (["--zone=us-east5"], "--zone=us-east5: needs a zone"),
        (["--accelerator-type=v5e-256"], "TPU VMs call it v5litepod-256"),
        (["--accelerator-type=tpu7x-128"], "launch/gke.py"),
        (["--accelerator-type=v5p-96"], "counts cores"),
        (["--accelerator-type=v6e-48"], "chips"),
        (["--accelerator-type=h100"], "v5p-N"),
        (["--slices=0"], "--slices=0"),
        (["--image=trainer"], "its tag or digest"),
        (["--shm-size=big"], "--shm-size=big"),
        (["--spot", "--reserved"], "exclude"),
        (["--env=A"], "KEY=VALUE"),
        (["--compile-cache=/tmp/x"], "gs://"),
        (["--colour=red"], "no such option"),
        (["--spot=yes"], "no such option"),
        (["extra"], "second command"),
    ],
)
def test_bad_arguments(change, told):
    assert told in refused("tpu_vm.sh", *UP, *change, "--dry-run", "--", *TRAIN)


@pytest.mark.parametrize(
    "train, told",
    [
        ([], "after --"),
        (["--workdir=gs://b/c"], "--config=FILE"),
        (["--config=a"], "--workdir=gs://BUCKET/FOLDER is missing"),
        (["--config=a", "--workdir=/home/me/run"], "must be gs://"),
        (["--config=a", "--workdir=gs://"], "must be gs://"),
        ([*TRAIN, "--config.data.path=data"], "--config.data.path=data"),
        ([*TRAIN, "--config.data.path", "/x"], "--config.data.path=/x"),
        ([*TRAIN, "--config.model.tokenizer=/x"], "--config.model.tokenizer=/x"),
        ([*TRAIN, "--config.init.llm=/exports/llm"], "--config.init.llm=/exports/llm"),
    ],
)
def test_bad_arguments_of_the_trainer(train, told):
    assert told in refused("tpu_vm.sh", *UP, "--dry-run", "--", *train)


def test_commands():
    assert "no command" in refused("tpu_vm.sh", *WHERE)
    assert "launch: no such command" in refused("tpu_vm.sh", "launch", *WHERE)
    assert "gcloud is not installed" in refused("tpu_vm.sh", "delete", *WHERE)
    (stop,) = dry_run("tpu_vm.sh", "stop", *WHERE, "--stop-seconds=600")
    assert flags(stop)["command"] == "sudo docker stop --time=600 vilam3"
    (logs,) = dry_run("tpu_vm.sh", "logs", *WHERE, "--node=1", "--worker=3")
    assert (flags(logs)["node"], flags(logs)["worker"]) == ("1", "3")


# A fake Google Cloud with one queued resource, whose workers are this machine; docker and sudo are fake, too.
GOOGLE = r"""#!/bin/bash
here=${0%/*}
[ "$1" = auth ] && exit
echo "$4" >>"$here/log"
state=$(<"$here/state")
case $4 in
  create)
    [ "$state" = NONE ] || { echo ALREADY_EXISTS >&2; exit 1; }
    mapfile -t coming <"$here/coming"
    echo "${coming[0]}" >"$here/state"
    printf '%s\n' "${coming[@]:1}" >"$here/coming"
    ;;
  describe)
    [ "$state" != NONE ] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    echo "$state"
    case $state in
      WAITING_FOR_RESOURCES) echo PROVISIONING >"$here/state" ;;
      PROVISIONING) echo ACTIVE >"$here/state" ;;
    esac
    ;;
  delete) echo NONE >"$here/state" ;;
  ssh)
    for word in "$@"; do case $word in --command=*) command=${word#*=} ;; esac; done
    first=0
    for ((worker = 0; worker < $(<"$here/workers"); worker++)); do
      bash -c "$command" || { code=$?; [ $first != 0 ] || first=$code; }
    done
    exit $first # like gcloud: the code of the first worker that failed
    ;;
esac
"""
DOCKER = r"""#!/bin/bash
here=${0%/*}
echo "$1" >>"$here/log"
case $1 in
  inspect) cat "$here/container" 2>/dev/null ;;
  rm) rm -f "$here/container" ;;
  run)
    echo "${*@Q}" >>"$here/starts"
    for word in "$@"; do
      case $word in --label=vilam3.run=*) echo "true ${word##*=}" >"$here/container" ;; esac
    done
    ;;
  wait)
    mapfile -t trainer <"$here/trainer"
    printf '%s\n' "${trainer[@]:1}" >"$here/trainer"
    read -r code after <<<"${trainer[0]}"
    [ "$code" != lost ] || { echo "error waiting for container: unexpected EOF" >&2; exit 1; }
    [ -z "$after" ] || { echo "$after" >"$here/state"; rm -f "$here/container"; }
    [ ! -f "$here/container" ] || sed -i s/true/false/ "$here/container"
    echo "$code"
    ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """Returns `run(trainer, *arguments, ...)`; `trainer` is "exit code [state after]" for every start."""
    programs = {"gcloud": GOOGLE, "docker": DOCKER, "sudo": '#!/bin/sh\nexec "$@"\n', "sleep": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)

    def run(trainer, *arguments, state="NONE", coming=(), container="", workers=1):
        files = {"state": state, "coming": "\n".join([*coming, *["WAITING_FOR_RESOURCES"] * 9])}
        files |= {"trainer": "\n".join(trainer), "workers": str(workers), "log": "", "starts": ""}
        files |= {"container": container} if container else {}
        (tmp_path / "container").unlink(missing_ok=True)
        for name, text in files.items():
            (tmp_path / name).write_text(f"{text}\n" if text else "")
        done = launch("tpu_vm.sh", *arguments, "--", *TRAIN, path=tmp_path)
        after = (*files, "container")
        return done, {n: (tmp_path / n).read_text().strip() for n in after if (tmp_path / n).exists()}

    return run


def verbs(world):
    """Actions on the machines and the trainer, in order."""
    return [verb for verb in world["log"].split() if verb in ("create", "delete", "run", "wait", "stop")]


def test_finished_run_gives_the_machines_back(cloud):
    done, world = cloud(["0"], *UP)
    assert done.returncode == 0, done.stderr
    assert verbs(world) == ["create", "run", "wait", "delete"]
    assert world["state"] == "NONE"
    assert "m3 is ACTIVE" in done.stderr


def test_preempted_run_asks_again_and_resumes(cloud):
    done, world = cloud(["143 SUSPENDED", "255 SUSPENDING", "0"], *UP, "--spot")
    assert done.returncode == 0, done.stderr
    once = ["create", "run", "wait"]
    assert verbs(world) == [*once, "delete", *once, "delete", *once, "delete"]
    starts = world["starts"].splitlines()
    assert len(starts) == 3 and len(set(starts)) == 1  # the same command resumes


def test_crash_starts_again_on_the_same_machines(cloud):
    done, world = cloud(["134", "143", "0"], *UP)
    assert done.returncode == 0
    assert verbs(world) == ["create", "run", "wait", "run", "wait", "run", "wait", "delete"]


def test_docker_that_fails_is_no_end_of_the_trainer(cloud):
    done, world = cloud(["lost", "0"], *UP)
    assert done.returncode == 0
    assert verbs(world) == ["create", "run", "wait", "wait", "delete"]  # the trainer was not restarted


def test_what_gcloud_warns_of_is_no_state(cloud, tmp_path):
    warning = "echo 'WARNING: Python 3.9 will be deprecated, NOT_FOUND in 2027' >&2\nhere="
    (tmp_path / "gcloud").write_text(GOOGLE.replace("here=", warning, 1))
    done, world = cloud(["143 SUSPENDED", "0"], *UP)
    assert done.returncode == 0, done.stderr
    once = ["create", "run", "wait", "delete"]
    assert verbs(world) == [*once, *once]


def test_a_folder_has_one_cache_in_either_form():
    (command,) = dry_run("tpu_vm.sh", "train", *WHERE, IMAGE, train=[*TRAIN[:1], "--workdir=gs://bucket/a/"])
    assert "--env=JAX_COMPILATION_CACHE_DIR=gs://bucket/a/compile_cache" in container(command)[0]


def test_users_error_is_not_tried_again(cloud):
    done, world = cloud(["2"], *UP)
    assert done.returncode == 2
    assert verbs(world) == ["create", "run", "wait", "delete"]


def test_users_error_of_one_process_among_several(cloud):
    done, world = cloud(["1", "2", "1"], *UP, state="ACTIVE", workers=3)
    assert done.returncode == 2
    assert verbs(world).count("wait") == 3
    assert world["state"] == "NONE"


def test_gives_up_after_retries(cloud):
    done, world = cloud(["1"] * 9, *UP, "--retries=1")
    assert done.returncode == 1
    assert verbs(world).count("run") == 2
    assert world["state"] == "NONE"


def test_keep(cloud):
    done, world = cloud(["0"], *UP, "--keep")
    assert world["state"] == "ACTIVE"
    assert "billed until" in done.stderr


def test_no_capacity_gives_up(cloud):
    done, world = cloud([], *UP, "--valid-until-duration=1h", coming=["FAILED"])
    assert done.returncode == 1
    assert verbs(world) == ["create", "delete"]


def test_machines_that_are_there_are_used(cloud):
    _, world = cloud(["0"], *UP, state="ACTIVE")
    assert verbs(world) == ["run", "wait", "delete"]


def test_same_command_again_leaves_a_running_trainer_alone(cloud):
    train = ["train", *WHERE, IMAGE]
    _, first = cloud([], *train, state="ACTIVE")
    done, again = cloud([], *train, state="ACTIVE", container=first["container"])
    assert done.returncode == 0
    assert "already training" in done.stdout
    assert verbs(again) == []
    done, again = cloud([], *train, state="ACTIVE", container=first["container"].replace("true", "false"))
    assert verbs(again) == ["run"]


def test_another_run_is_not_ended(cloud):
    done, world = cloud([], "train", *WHERE, IMAGE, state="ACTIVE", container="true 1234")
    assert done.returncode == 3
    assert "another run is training here" in done.stderr
    assert verbs(world) == []


def test_no_answer_is_not_taken_for_no_machines(cloud, tmp_path):
    (tmp_path / "gcloud").write_text("#!/bin/sh\necho 'ERROR: network is unreachable' >&2\nexit 1\n")
    done, _ = cloud([], *UP, "--retries=1")
    assert done.returncode == 1
    assert "unreachable" in done.stderr
    assert "giving up after 2 attempts" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud here")
def test_gcloud_knows_the_flags():
    commands = dry_run(
        "tpu_vm.sh",
        *UP,
        "--slices=2",
        "--reserved",
        "--service-account=a@b.c",
        "--valid-until-duration=6h",
        train=TRAIN,
    )
    commands += dry_run("tpu_vm.sh", "create", *WHERE, "--accelerator-type=v5p-8", "--spot")
    known = {}
    for command in commands:
        verb = command[4]
        if verb not in known:
            text = subprocess.run(
                [*GCLOUD, verb, "--help"], capture_output=True, text=True, check=True
            ).stdout
            known[verb] = set(re.findall(r"--([a-z-]+)", re.sub(r"\x1b\[[0-9;]*m", "", text))) | {
                "project",
                "quiet",
                "format",
            }
        assert set(flags(command)) <= known[verb], (verb, set(flags(command)) - known[verb])
