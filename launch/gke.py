#!/usr/bin/env python3
"""Trains on TPUs of a GKE cluster: a JobSet through kubectl, or an XPK workload; see --help.

Uses the standard library only. --dry-run prints the manifest and the commands.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

HERE = Path(__file__).resolve().parent
RUN = "/vilam3/run.sh"  # launch/run.sh in the images
USER_ERROR = 2
# Settings of the trainer that are paths.
_COMPONENTS = ("everything", "vision_tower", "text_tower", "projector", "llm")
PATH_FLAGS = ("config.data.path", "config.data.annotations", "config.model.tokenizer")
PATH_FLAGS += tuple(f"config.init.{name}" for name in _COMPONENTS)

DESCRIPTION = """\
Trains on TPUs of a GKE cluster.

commands:
  train    create a JobSet: one Job per slice, one pod per host
  xpk      the same with `xpk workload create`
  job      run one command in one pod: prepare data, annotate, evaluate
  annotate create a RayJob: run an expert over a large dataset, on many pods
  status   show a run and its pods
  logs     follow the output of the first host
  delete   send SIGTERM, let the run save, and end it; the node pool stays and is billed
"""
EXAMPLE = """\
Arguments after -- are those of `vilam3 train` (train, xpk), those of `vilam3-experts annotate` (annotate), or
the whole command (job). After `delete`, the same command resumes. Configure kubectl for the cluster first:
gcloud container clusters get-credentials.

example:
  launch/gke.py train --name=m3 --accelerator=v5p-128 --image=us-docker.pkg.dev/my-project/vilam3/trainer:1 \\
    -- --config=configs/stage2a_align.py:vila_m3_8b --workdir=gs://my-bucket/stage2a \\
    --config.data.path=gs://my-bucket/data --config.init.llm=gs://my-bucket/llm --config.model.tokenizer=gs://my-bucket/llm/tokenizer
"""


class UsageError(Exception):
    """An error of the user; the message names it and the fix."""


class Family(NamedTuple):
    """A TPU generation.

    Attributes:
      label: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      cores: cores per chip if slice names count cores, else 1.
      dimensions: of the torus.
      xpk: name in XPK and in `gcloud compute tpus`.
    """

    label: str
    cores: int
    dimensions: int
    xpk: str


FAMILIES = {
    "v4": Family("tpu-v4-podslice", 2, 3, "v4"),
    "v5e": Family("tpu-v5-lite-podslice", 1, 2, "v5litepod"),
    "v5p": Family("tpu-v5p-slice", 2, 3, "v5p"),
    "v6e": Family("tpu-v6e-slice", 1, 2, "v6e"),
    "tpu7x": Family("tpu7x", 2, 3, "tpu7x"),
}
FLAT = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
SMALL_CUBES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
CHIPS_PER_HOST = 4
RAY_VERSION = "2.60.0"  # of constraints/py311.txt
HEAD_SIZE = {"cpu": "4", "memory": "16Gi"}
RUN_LABEL = "vilam3/run"
# Replaces KubeRay's health check, which needs a program that the image lacks.
RAY_PROBE = {
    "httpGet": {"path": "/api/local_raylet_healthz", "port": 52365},
    "initialDelaySeconds": 30,
    "periodSeconds": 10,
    "timeoutSeconds": 5,
    "failureThreshold": 12,
}


class Slice(NamedTuple):
    """TPU chips connected as a torus.

    Attributes:
      family: key of `FAMILIES`.
      shape: chips along each dimension.
    """

    family: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Number of hosts, each with one pod."""
        return self.chips // CHIPS_PER_HOST

    @property
    def topology(self) -> str:
        """The Kubernetes label, such as `4x4x4`."""
        return "x".join(map(str, self.shape))

    @property
    def xpk_type(self) -> str:
        """The XPK name, such as `v5p-128`."""
        family = FAMILIES[self.family]
        return f"{family.xpk}-{self.chips * family.cores}"


def parse_slice(text: str) -> Slice:
    """Parses `v5p-128` (cores for v4, v5p and tpu7x, chips for v5e and v6e) or `v5p:4x4x4` (chips)."""
    match = re.fullmatch(r"(v4|v5e|v5litepod|v5p|v6e|tpu7x)(?:-(\d+)|[:-](\d+(?:x\d+)+))", text)
    if not match:
        raise UsageError(
            f"--accelerator={text}: must be like v5p-128 or v5p:4x4x4; families are {', '.join(FAMILIES)}"
        )
    name = "v5e" if match[1] == "v5litepod" else match[1]
    family = FAMILIES[name]
    if match[3]:
        shape = tuple(map(int, match[3].split("x")))
        chips = math.prod(shape)
    else:
        chips, rest = divmod(int(match[2]), family.cores)
        shape = () if rest else _shape(chips, family.dimensions)
    if len(shape) != family.dimensions or not _valid(shape):
        counted = "cores, two per chip" if family.cores == 2 else "chips"
        known = "4x4, 4x8, 16x16" if family.dimensions == 2 else "2x2x2, 4x4x4, 4x8x8"
        raise UsageError(
            f"--accelerator={text}: no such slice; {name}-N counts {counted}, shapes are like {known}"
        )
    return Slice(name, shape)


def _shape(chips: int, dimensions: int) -> tuple[int, ...]:
    """The most compact shape of that many chips, or ()."""
    if dimensions == 2:
        return FLAT.get(chips, ())
    if chips in SMALL_CUBES:
        return SMALL_CUBES[chips]
    cubes, rest = divmod(chips, 64)
    if rest:
        return ()
    shapes = [
        (4 * a, 4 * b, 4 * (cubes // (a * b)))
        for a in range(1, cubes + 1)
        for b in range(a, cubes + 1)
        if cubes % (a * b) == 0 and cubes // (a * b) >= b
    ]
    return min(shapes, key=sum, default=())


def _valid(shape: tuple[int, ...]) -> bool:
    multiples_of_4 = list(shape) == sorted(shape) and all(side and side % 4 == 0 for side in shape)
    return shape in (*FLAT.values(), *SMALL_CUBES.values()) or (len(shape) == 3 and multiples_of_4)


def flag_value(arguments: Sequence[str], name: str) -> str:
    """Value of the last `--name=VALUE` or `--name VALUE`, or nothing."""
    value = ""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}" and index + 1 < len(arguments):
            value = arguments[index + 1]
    return value


def check_path(name: str, value: str) -> None:
    """Refuses paths outside buckets."""
    if not re.match(r"gs://.", value):
        raise UsageError(f"--{name}={value}: must be gs://BUCKET/FOLDER, after --; pods see no other paths")


def check_train(arguments: Sequence[str]) -> None:
    """Checks the arguments of `vilam3 train`: a recipe, and all paths in buckets."""
    if not flag_value(arguments, "config"):
        raise UsageError(
            "--config=FILE[:ARG] is missing after --, such as --config=configs/stage4_expert.py:vila_m3_8b"
        )
    check_path("workdir", flag_value(arguments, "workdir"))
    for name in PATH_FLAGS:
        if value := flag_value(arguments, name):
            check_path(name, value)


def check_annotate(arguments: Sequence[str]) -> None:
    """Checks the arguments of `vilam3-experts annotate`: an expert, and all paths in buckets."""
    if not flag_value(arguments, "expert"):
        raise UsageError("--expert=NAME is missing after --; see `vilam3-experts list`")
    for name in ("data", "out", "weights", "audit"):
        value = flag_value(arguments, name)
        if value or name in ("data", "out"):
            check_path(name, value)
    for name in ("engine", "address"):
        if flag_value(arguments, name):
            raise UsageError(f"--{name}: omit it after --; the launcher sets it")


def manifest(template: str, values: dict[str, object]) -> str:
    """Fills in `launch/<template>.yaml`; each value is inserted as JSON, a subset of YAML."""
    text = (HERE / f"{template}.yaml").read_text(encoding="utf-8")
    comment, _, body = text.partition("\n")
    filled = string.Template(body).substitute({name: json.dumps(value) for name, value in values.items()})
    return f"{comment.partition('.')[0]}, made by launch/gke.py.\n{filled}"


def jobset(options: argparse.Namespace) -> str:
    """The manifest of `train`."""
    chosen = parse_slice(options.accelerator)
    if options.slices > 1 and chosen.hosts == 1:
        raise UsageError(
            f"--slices={options.slices}: each slice must have several hosts; {options.accelerator} has one"
        )
    environment = {"JAX_COMPILATION_CACHE_DIR": _cache(options)}
    port = 8482  # JAX's default, which a firewall between slices blocks in some projects
    if options.slices > 1:
        port = 8476
        environment["JAX_COORDINATOR_PORT"] = str(port)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": FAMILIES[chosen.family].label,
        "cloud.google.com/gke-tpu-topology": chosen.topology,
    }
    return manifest(
        "gke_jobset",
        _common(options, selector, environment)
        | {
            "slices": options.slices,
            "hosts": chosen.hosts,
            "chips_per_host": CHIPS_PER_HOST,
            "coordinator_port": port,
            "command": ["vilam3", "train", *map(_literal, options.arguments)],
        },
    )


def job(options: argparse.Namespace) -> str:
    """The manifest of `job`."""
    return manifest("gke_job", _pod(options) | {"command": list(map(_literal, options.arguments))})


def rayjob(options: argparse.Namespace) -> str:
    """The manifest of `annotate`."""
    command = ["vilam3-experts", "annotate", *options.arguments, "--engine=ray", "--address=auto"]
    values = _pod(options) | {
        "entrypoint": shlex.join(command),
        "ray_version": RAY_VERSION,
        "workers": options.workers,
        "head_size": HEAD_SIZE,
        "head_limits": {"memory": HEAD_SIZE["memory"]},
        "probe": RAY_PROBE,
    }
    values["pod_labels"] = {"app.kubernetes.io/name": "vilam3", RUN_LABEL: options.name}
    return manifest("gke_rayjob", values)


def _pod(options: argparse.Namespace) -> dict[str, object]:
    """Values of a pod without TPUs."""
    selector, limits = {}, {"memory": options.memory}
    if options.gpu:
        selector["cloud.google.com/gke-accelerator"] = options.gpu
        limits["nvidia.com/gpu"] = 1
    size = {"cpu": options.cpu, "memory": options.memory}
    return _common(options, selector, {}) | {"requests": size, "limits": limits}


def xpk(options: argparse.Namespace) -> list[str]:
    """The command line of `xpk`."""
    chosen = parse_slice(options.accelerator)
    command = [
        *("xpk", "workload", "create", "--workload", options.name, "--cluster", options.cluster),
        *("--project", options.project, "--zone", options.zone, "--tpu-type", chosen.xpk_type),
        *("--num-slices", str(options.slices), "--docker-image", options.image),
        # XPK does not restart after 1, a crash, by default.
        *("--max-restarts", str(options.max_restarts), "--restart-on-exit-codes", "1"),
        *("--termination-grace-period-seconds", str(options.stop_seconds)),
    ]
    environment = {"JAX_COMPILATION_CACHE_DIR": _cache(options)} | options.env
    if options.slices > 1:
        environment = {"JAX_COORDINATOR_PORT": "8476"} | environment
    for key, value in environment.items():
        command += ["--env", f"{key}={value}"]
    # XPK replaces the entry point of the image, and restarts after 143, run.sh's code for interrupted runs.
    return [*command, "--command", shlex.join([RUN, "vilam3", "train", *options.arguments])]


def _common(
    options: argparse.Namespace, selector: dict[str, str], environment: dict[str, str]
) -> dict[str, object]:
    tolerations = []
    if options.spot:
        key = "cloud.google.com/gke-spot"
        selector[key] = "true"
        tolerations.append({"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    labels = {"app.kubernetes.io/name": "vilam3"}
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    return {
        "name": options.name,
        "namespace": options.namespace,
        "labels": labels | queue,
        "pod_labels": labels,
        "image": options.image,
        "max_restarts": options.max_restarts,
        "stop_seconds": options.stop_seconds,
        "shm_size": options.shm_size,
        "node_selector": selector,
        "tolerations": tolerations,
        "environment": [
            {"name": key, "value": _literal(value)} for key, value in (environment | options.env).items()
        ],
    }


def _literal(text: str) -> str:
    """Escapes `$(`, which Kubernetes would expand, as `$$(`."""
    return text.replace("$(", "$$(")


def _cache(options: argparse.Namespace) -> str:
    return options.compile_cache or flag_value(options.arguments, "workdir").rstrip("/") + "/compile_cache"


def _matching(pattern: str, what: str):
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r}: {what}")
        return text

    return check


def _positive(text: str) -> int:
    return int(_matching(r"[1-9][0-9]*", "must be an integer of at least 1")(text))


NAME = _matching(
    r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
    "needs at most 40 lower-case letters, digits and -, starting with a letter",
)
IMAGE = _matching(
    r"[a-z0-9]\S*(:[\w.-]+|@sha256:[0-9a-f]{64})",
    "needs an image with its tag or digest, such as us-docker.pkg.dev/PROJECT/vilam3/trainer:1",
)
BUCKET = _matching(r"gs://.+", "must be gs://BUCKET/FOLDER")
QUANTITY = _matching(r"[1-9][0-9]*(Mi|Gi)", "must be like 32Gi")
SETTING = _matching(r"[A-Za-z_]\w*=(.|\n)*", "must be KEY=VALUE")
PROJECT = _matching(r"[a-z][-a-z0-9:.]{4,}[a-z0-9]", "needs the ID of a Google Cloud project")
ZONE = _matching(r"[a-z]+-[a-z]+[0-9]+-[a-z]", "needs a zone, such as us-east5-a")

RUNS = ("train", "xpk", "job", "annotate")
COMMANDS = (*RUNS, "status", "logs", "delete")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(
        prog="gke.py",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    every = {name: commands.add_parser(name) for name in COMMANDS}

    def add(names: Iterable[str], flag: str, **kwargs: Any) -> None:
        for name in names:
            every[name].add_argument(flag, **kwargs)

    add(COMMANDS, "--name", required=True, type=NAME, help="name of the run in the cluster")
    add(COMMANDS, "--dry-run", action="store_true", help="print the commands without running them")
    add(set(COMMANDS) - {"xpk"}, "--namespace", default="default", type=NAME, help="(default)")
    for name in ("status", "logs", "delete"):
        creator = every[name].add_mutually_exclusive_group()
        creator.add_argument("--job", action="store_true", help="created by `job`, not by `train` or `xpk`")
        creator.add_argument("--ray", action="store_true", help="created by `annotate`")
    add(RUNS, "--image", required=True, type=IMAGE, help="image with its tag or digest")
    setting: Any = dict(action="append", default=[], type=SETTING, metavar="KEY=VALUE")
    add(RUNS, "--env", help="environment; repeatable", **setting)
    add(RUNS, "--max-restarts", default=20, type=_positive, help="retries after a failure (20; annotate: 3)")
    seconds = "time to save after SIGTERM (300); shorter on spot nodes"
    add(RUNS, "--stop-seconds", default=300, type=_positive, help=seconds)
    tpu, pods = ("train", "xpk"), ("train", "job", "annotate")
    slice_ = "slice: v5p-128 as it is rented, or v5p:4x4x4 in chips; v4, v5e, v5p, v6e, tpu7x"
    add(tpu, "--accelerator", required=True, help=slice_)
    add(tpu, "--slices", default=1, type=_positive, help="slices connected by the network (1)")
    add(tpu, "--compile-cache", type=BUCKET, help="cache of compiled programs (WORKDIR/compile_cache)")
    memory = "shared memory of a pod (train: 32Gi; others: 8Gi)"
    add(pods, "--shm-size", default="32Gi", type=QUANTITY, help=memory)
    add(pods, "--spot", action="store_true", help="use spot nodes")
    add(pods, "--queue", type=NAME, help="LocalQueue of Kueue, if the cluster has it")
    add(pods[1:], "--cpu", default="8", help="requested CPUs (8)")
    add(pods[1:], "--memory", default="32Gi", type=QUANTITY, help="memory (32Gi)")
    add(pods[1:], "--gpu", help="one GPU of this type, such as nvidia-l4")
    add(["annotate"], "--workers", required=True, type=_positive, help="pods that run the expert")
    for name in pods[1:]:
        every[name].set_defaults(shm_size="8Gi")
    every["annotate"].set_defaults(max_restarts=3)  # KubeRay also retries user errors
    add(["xpk"], "--cluster", required=True, type=NAME, help="cluster created by `xpk cluster create`")
    add(["xpk"], "--project", required=True, type=PROJECT)
    add(["xpk"], "--zone", required=True, type=ZONE)
    return top


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    options = parser().parse_args(argv[:split])
    options.arguments = argv[split + 1 :]
    if options.command not in RUNS:
        if options.arguments:
            raise UsageError(f"{options.command} takes no arguments after --")
        return _manage(options)
    options.env = dict(setting.split("=", 1) for setting in options.env)
    if options.command == "job" and not options.arguments:
        raise UsageError("no command after --, such as -- vilam3 data show --data gs://...")
    if options.command == "annotate":
        check_annotate(options.arguments)
    elif options.command != "job":
        check_train(options.arguments)
    make = {"train": jobset, "xpk": xpk, "job": job, "annotate": rayjob}[options.command]
    made = make(options)
    if options.command in ("train", "xpk"):
        _warn_of_cost(options)
    if options.command == "xpk":
        return _run(options, made)
    # Unlike `apply`, `create` fails if a run of that name exists.
    return _run(options, ["kubectl", "create", "-f", "-"], made)


def _manage(options: argparse.Namespace) -> int:
    """Runs `status`, `logs` or `delete`."""
    kind = "job" if options.job else "rayjob" if options.ray else "jobset"
    target = ["--namespace", options.namespace]
    if options.command == "delete":
        return _run(options, ["kubectl", "delete", kind, options.name, *target])
    label = {
        "job": "batch.kubernetes.io/job-name",
        "jobset": "jobset.sigs.k8s.io/jobset-name",
        # The pod that submits prints the driver's output; it belongs to a Job with the name of the RayJob.
        "rayjob": "batch.kubernetes.io/job-name" if options.command == "logs" else RUN_LABEL,
    }[kind]
    selector = f"{label}={options.name}"
    if options.command == "status":
        code = _run(options, ["kubectl", "get", kind, options.name, *target])
        pods = ["kubectl", "get", "pods", "--output=wide", *target, "--selector", selector]
        return _run(options, pods) or code
    if kind == "jobset":
        selector += ",jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    return _run(options, ["kubectl", "logs", "--follow", "--tail=200", *target, "--selector", selector])


def _warn_of_cost(options: argparse.Namespace) -> None:
    chips = parse_slice(options.accelerator).chips * options.slices
    cost = "their node pools are billed even when idle; `vilam3 plan` estimates time and cost"
    print(f"gke.py: {chips} chips; {cost}", file=sys.stderr)


def _run(options: argparse.Namespace, command: list[str], text: str | None = None) -> int:
    if options.dry_run:
        print(shlex.join(command) + ("" if text is None else f" <<'MANIFEST'\n{text}MANIFEST"))
        return 0
    if not shutil.which(command[0]):
        raise UsageError(f"{command[0]} is not installed or not on PATH; install it, or use --dry-run")
    return subprocess.run(command, input=text, text=True, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"gke.py: error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
