#!/usr/bin/env python3
"""Trains on TPUs of a GKE cluster: a JobSet through kubectl, or an XPK workload. Needs nothing but Python.

launch/gke.py --help explains; --dry-run prints the manifest and the commands.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from typing import NoReturn

HERE = Path(__file__).resolve().parent
RUN = "/vilam3/run.sh"  # launch/run.sh in the images
USER_ERROR = 2
# The trainer's settings that are paths.
PLACES = ("config.data.path", "config.data.annotations", "config.model.tokenizer")
PLACES += tuple(
    f"config.init.{part}" for part in ("everything", "vision_tower", "text_tower", "projector", "llm")
)

DESCRIPTION = """\
Trains on TPUs of a GKE cluster.

commands:
  train    a JobSet: one Job a slice, one pod a host
  xpk      the same through `xpk workload create`
  job      one pod for one command: prepare data, annotate, evaluate
  annotate a RayJob: an expert over a large dataset, on many pods
  status   what there is and how it does
  logs     follow the first host's output
  delete   stop: SIGTERM, save, end; the node pool stays, and costs
"""
EXAMPLE = """\
What follows -- is given to `vilam3 train` (train, xpk) or `vilam3-experts annotate` (annotate), or is the
whole command (job). The same command again, after `delete`, goes on where it was. kubectl must point at the
cluster: gcloud container clusters get-credentials.

example:
  launch/gke.py train --name=m3 --accelerator=v5p-128 --image=us-docker.pkg.dev/my-project/vilam3/trainer:1 \\
    -- --config=configs/stage2a_align.py:vila_m3_8b --workdir=gs://my-bucket/stage2a \\
    --config.data.path=gs://my-bucket/data --config.init.llm=gs://my-bucket/llm --config.model.tokenizer=gs://my-bucket/llm/tokenizer
"""


class UsageError(Exception):
    """What the user gave is wrong; the message names it and the fix."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A TPU generation.

    Attributes:
      label: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      cores: cores a chip that the number in the type's name counts.
      dimensions: of its torus.
      xpk: its name in XPK and in `gcloud compute tpus`.
      machine: machine type with 4 chips.
    """

    label: str
    cores: int
    dimensions: int
    xpk: str
    machine: str


FAMILIES = {
    "v4": Family("tpu-v4-podslice", 2, 3, "v4", "ct4p-hightpu-4t"),
    "v5e": Family("tpu-v5-lite-podslice", 1, 2, "v5litepod", "ct5lp-hightpu-4t"),
    "v5p": Family("tpu-v5p-slice", 2, 3, "v5p", "ct5p-hightpu-4t"),
    "v6e": Family("tpu-v6e-slice", 1, 2, "v6e", "ct6e-standard-4t"),
    "tpu7x": Family("tpu7x", 2, 3, "tpu7x", "tpu7x-standard-4t"),
}
FLAT = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
SMALL_CUBES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
CHIPS_PER_HOST = 4
RAY_VERSION = "2.60.0"  # of constraints/py311.txt
HEAD_SIZE = {"cpu": "4", "memory": "16Gi"}
RUN_LABEL = "vilam3/run"
# Ray's own health check, over HTTP: KubeRay's needs a program that the image does not have.
RAY_PROBE = {
    "httpGet": {"path": "/api/local_raylet_healthz", "port": 52365},
    "initialDelaySeconds": 30,
    "periodSeconds": 10,
    "timeoutSeconds": 5,
    "failureThreshold": 12,
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """TPU chips wired to each other.

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
        """Number of machines, and of pods."""
        return self.chips // CHIPS_PER_HOST

    @property
    def topology(self) -> str:
        """As Kubernetes labels have it: `4x4x4`."""
        return "x".join(map(str, self.shape))

    @property
    def xpk_type(self) -> str:
        """As XPK has it: `v5p-128`."""
        family = FAMILIES[self.family]
        return f"{family.xpk}-{self.chips * family.cores}"


def parse_slice(text: str) -> Slice:
    """Reads `v5p-128` (as rented: cores for v4, v5p and tpu7x, chips for v5e and v6e) or `v5p:4x4x4` (chips).

    Raises:
      UsageError: no such TPU.
    """
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
        counted = "cores, two a chip" if family.cores == 2 else "chips"
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
    if len(shape) == 2:
        return shape in FLAT.values()
    return shape in SMALL_CUBES.values() or (
        list(shape) == sorted(shape) and all(side and side % 4 == 0 for side in shape)
    )


def flag_value(arguments: Sequence[str], name: str) -> str:
    """Value of the last `--name=VALUE` or `--name VALUE`, or nothing."""
    value = ""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}" and index + 1 < len(arguments):
            value = arguments[index + 1]
    return value


def check_train(arguments: Sequence[str]) -> None:
    """Refuses a trainer's command line that cannot work on several machines.

    Raises:
      UsageError: no recipe, or something is not in a bucket.
    """
    if not flag_value(arguments, "config"):
        raise UsageError(
            "--config=FILE[:ARG] is missing after --, such as --config=configs/stage4_expert.py:vila_m3_8b"
        )
    workdir = flag_value(arguments, "workdir")
    if not re.match(r"gs://.", workdir):
        raise UsageError(
            f"--workdir={workdir}: must be gs://BUCKET/FOLDER, after --; no machine sees another's disk, and "
            "the disks go with the machines"
        )
    for place in PLACES:
        value = flag_value(arguments, place)
        if value and not re.match(r"gs://.", value):
            raise UsageError(
                f"--{place}={value}: must be gs://BUCKET/FOLDER; the machines see nothing else of yours"
            )


def manifest(template: str, values: dict[str, object]) -> str:
    """Fills `launch/<template>.yaml`; values become JSON, which is YAML.

    Args:
      template: `gke_jobset`, `gke_job` or `gke_rayjob`.
      values: name → what stands there; every name must occur.
    """
    text = (HERE / f"{template}.yaml").read_text(encoding="utf-8")
    comment, _, body = text.partition("\n")
    filled = string.Template(body).substitute({name: json.dumps(value) for name, value in values.items()})
    return f"{comment.partition('.')[0]}, made by launch/gke.py.\n{filled}"


def jobset(options: argparse.Namespace) -> str:
    """The manifest of `train`."""
    chosen = parse_slice(options.accelerator)
    if options.slices > 1 and chosen.hosts == 1:
        raise UsageError(
            f"--slices={options.slices}: slices that are joined have several hosts, {options.accelerator} one"
        )
    environment = {"JAX_COMPILATION_CACHE_DIR": _cache(options)}
    port = 8482  # JAX's own; shut by the firewall that some projects get between slices
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
            "command": _literal(["vilam3", "train", *options.arguments]),
        },
    )


def job(options: argparse.Namespace) -> str:
    """The manifest of `job`."""
    size = {"cpu": options.cpu, "memory": options.memory}
    selector = {}
    limits: dict[str, object] = {"memory": options.memory}
    if options.gpu:
        selector["cloud.google.com/gke-accelerator"] = options.gpu
        limits["nvidia.com/gpu"] = 1
    values = _common(options, selector, {}) | {"command": _literal(options.arguments)}
    return manifest("gke_job", values | {"requests": size, "limits": limits})


def check_annotate(arguments: Sequence[str]) -> None:
    """Refuses a command line of `vilam3-experts annotate` that cannot work on several machines.

    Raises:
      UsageError: something is missing, is not in a bucket, or is this launcher's to say.
    """
    if not flag_value(arguments, "expert"):
        raise UsageError("--expert=NAME is missing after --; see `vilam3-experts list`")
    for place in ("data", "out", "weights", "audit"):
        value = flag_value(arguments, place)
        needed = place in ("data", "out")
        if (needed or value) and not re.match(r"gs://.", value):
            raise UsageError(
                f"--{place}={value}: must be gs://BUCKET/FOLDER, after --; the machines see nothing else"
            )
    for name in ("engine", "address"):
        if flag_value(arguments, name):
            raise UsageError(f"--{name}: leave it out after --; it is the launcher's to say")


def rayjob(options: argparse.Namespace) -> str:
    """The manifest of `annotate`."""
    selector = {}
    limits: dict[str, object] = {"memory": options.memory}
    if options.gpu:
        selector["cloud.google.com/gke-accelerator"] = options.gpu
        limits["nvidia.com/gpu"] = 1
    command = ["vilam3-experts", "annotate", *options.arguments, "--engine=ray", "--address=auto"]
    values = _common(options, selector, {}) | {
        "entrypoint": shlex.join(command),
        "ray_version": RAY_VERSION,
        "workers": options.workers,
        "requests": {"cpu": options.cpu, "memory": options.memory},
        "limits": limits,
        "head_size": HEAD_SIZE,
        "head_limits": {"memory": HEAD_SIZE["memory"]},
        "probe": RAY_PROBE,
    }
    values["pod_labels"] = {"app.kubernetes.io/name": "vilam3", RUN_LABEL: options.name}
    return manifest("gke_rayjob", values)


def xpk(options: argparse.Namespace) -> list[str]:
    """The command line of `xpk`."""
    chosen = parse_slice(options.accelerator)
    command = [
        *("xpk", "workload", "create", "--workload", options.name, "--cluster", options.cluster),
        *("--project", options.project, "--zone", options.zone, "--tpu-type", chosen.xpk_type),
        *("--num-slices", str(options.slices), "--docker-image", options.image),
        # By itself XPK takes 1, a crash, for the end of the workload, as 2, an error of the user.
        *("--max-restarts", str(options.max_restarts), "--restart-on-exit-codes", "1"),
        *("--termination-grace-period-seconds", str(options.stop_seconds)),
    ]
    environment = {"JAX_COMPILATION_CACHE_DIR": _cache(options)} | options.env
    if options.slices > 1:
        environment = {"JAX_COORDINATOR_PORT": "8476"} | environment
    for key, value in environment.items():
        command += ["--env", f"{key}={value}"]
    # XPK replaces the image's entry point, and starts again after 143: run.sh's code for an interrupted run.
    return [*command, "--command", shlex.join([RUN, "vilam3", "train", *options.arguments])]


def _common(
    options: argparse.Namespace, selector: dict[str, str], environment: dict[str, str]
) -> dict[str, object]:
    tolerations = []
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spot = {
            "key": "cloud.google.com/gke-spot",
            "operator": "Equal",
            "value": "true",
            "effect": "NoSchedule",
        }
        tolerations.append(spot)
    labels = {"app.kubernetes.io/name": "vilam3"}
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    variables = environment | options.env
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
            {"name": key, "value": value}
            for key, value in zip(variables, _literal(variables.values()), strict=True)
        ],
    }


def _literal(arguments: Iterable[str]) -> list[str]:
    """Kubernetes would put variables in the place of `$(NAME)`; `$$` is its way to write one dollar."""
    return [argument.replace("$(", "$$(") for argument in arguments]


def _cache(options: argparse.Namespace) -> str:
    return options.compile_cache or flag_value(options.arguments, "workdir").rstrip("/") + "/compile_cache"


def _matching(pattern: str, what: str):
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r}: {what}")
        return text

    return check


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


NAME = _matching(
    r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
    "needs small letters, digits and -, at most 40, beginning with a letter",
)
IMAGE = _matching(
    r"[a-z0-9]\S*(:[\w.-]+|@sha256:[0-9a-f]{64})",
    "needs an image with its tag or digest, such as us-docker.pkg.dev/PROJECT/vilam3/trainer:1",
)
BUCKET = _matching(r"gs://.+", "must be gs://BUCKET/FOLDER")
QUANTITY = _matching(r"[1-9][0-9]*(Mi|Gi)", "must be like 32Gi")
SETTING = _matching(r"[A-Za-z_]\w*=(.|\n)*", "must be KEY=VALUE")
PROJECT = _matching(r"[a-z][-a-z0-9:.]{4,}[a-z0-9]", "needs the id of a Google Cloud project")
ZONE = _matching(r"[a-z]+-[a-z]+[0-9]+-[a-z]", "needs a zone, such as us-east5-a")


COMMANDS = ("train", "xpk", "job", "annotate", "status", "logs", "delete")


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
    for name, command in every.items():
        command.add_argument("--name", required=True, type=NAME, help="name of the run in the cluster")
        command.add_argument(
            "--dry-run", action="store_true", help="print what would be done, and do nothing"
        )
        if name != "xpk":
            command.add_argument("--namespace", default="default", type=NAME, help="(default)")
        if name in ("status", "logs", "delete"):
            made_by = command.add_mutually_exclusive_group()
            made_by.add_argument("--job", action="store_true", help="made by `job`, not by `train` or `xpk`")
            made_by.add_argument("--ray", action="store_true", help="made by `annotate`")
        if name in ("train", "xpk", "job", "annotate"):
            _add_run(command)
        if name in ("train", "xpk"):
            command.add_argument(
                "--accelerator",
                required=True,
                help="slice: v5p-128 as it is rented, or v5p:4x4x4 in chips; v4, v5e, v5p, v6e, tpu7x",
            )
            command.add_argument(
                "--slices", default=1, type=_positive, help="slices joined over the network (1)"
            )
            command.add_argument(
                "--compile-cache",
                type=BUCKET,
                help="where compiled programs are kept (WORKDIR/compile_cache)",
            )
        if name in ("train", "job", "annotate"):
            command.add_argument(
                "--shm-size", default="32Gi", type=QUANTITY, help="shared memory of a pod (32Gi)"
            )
            command.add_argument("--spot", action="store_true", help="run on spot nodes")
            command.add_argument("--queue", type=NAME, help="Kueue's LocalQueue, where the cluster has Kueue")
        if name in ("job", "annotate"):
            command.set_defaults(shm_size="8Gi")
            command.add_argument("--cpu", default="8", help="CPUs asked for (8)")
            command.add_argument("--memory", default="32Gi", type=QUANTITY, help="memory (32Gi)")
            command.add_argument("--gpu", help="one GPU of this kind, such as nvidia-l4")
        if name == "annotate":
            command.set_defaults(max_restarts=3)  # KubeRay tries again after a user's error, too
            command.add_argument("--workers", required=True, type=_positive, help="pods that run the expert")
    every["xpk"].add_argument(
        "--cluster", required=True, type=NAME, help="cluster made by `xpk cluster create`"
    )
    every["xpk"].add_argument("--project", required=True, type=PROJECT)
    every["xpk"].add_argument("--zone", required=True, type=ZONE)
    return top


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--image", required=True, type=IMAGE, help="image with its tag or digest")
    command.add_argument(
        "--env",
        action="append",
        default=[],
        type=SETTING,
        metavar="KEY=VALUE",
        help="environment; repeatable",
    )
    command.add_argument(
        "--max-restarts",
        default=20,
        type=_positive,
        help="tries after a failure (20; annotate: 3)",
    )
    command.add_argument(
        "--stop-seconds",
        default=300,
        type=_positive,
        help="time to save after SIGTERM (300); spot nodes give less",
    )


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    try:
        return _main(list(argv))
    except UsageError as error:
        print(f"gke.py: error: {error}", file=sys.stderr)
        return USER_ERROR


def _main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    options = parser().parse_args(argv[:split])
    options.arguments = argv[split + 1 :]
    if options.command in ("train", "xpk", "job", "annotate"):
        options.env = dict(setting.split("=", 1) for setting in options.env)
        if options.command == "job" and not options.arguments:
            raise UsageError("no command after --, such as -- vilam3 data show --data gs://...")
        if options.command == "annotate":
            check_annotate(options.arguments)
        elif options.command != "job":
            check_train(options.arguments)
    elif options.arguments:
        raise UsageError(f"{options.command} takes nothing after --")
    if options.command == "xpk":
        command = xpk(options)
        _warn_of_cost(options)
        return _run(options, command)
    if options.command in ("train", "job", "annotate"):
        # `create`, not `apply`: a run of that name that is there already is an error, not a silent success.
        made = {"train": jobset, "job": job, "annotate": rayjob}[options.command](options)
        if options.command == "train":
            _warn_of_cost(options)
        return _run(options, ["kubectl", "create", "-f", "-"], made)
    kind = "job" if options.job else "rayjob" if options.ray else "jobset"
    target = ["--namespace", options.namespace]
    owner = {
        "job": "batch.kubernetes.io/job-name",
        "jobset": "jobset.sigs.k8s.io/jobset-name",
        # The pod that submits, whose output is the driver's, belongs to a Job of the RayJob's name.
        "rayjob": "batch.kubernetes.io/job-name" if options.command == "logs" else RUN_LABEL,
    }[kind]
    selector = ["--selector", f"{owner}={options.name}"]
    if options.command == "delete":
        return _run(options, ["kubectl", "delete", kind, options.name, *target])
    if options.command == "status":
        code = _run(options, ["kubectl", "get", kind, options.name, *target])
        return _run(options, ["kubectl", "get", "pods", "--output=wide", *target, *selector]) or code
    first = ",jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    first = first if kind == "jobset" else ""
    return _run(
        options, ["kubectl", "logs", "--follow", "--tail=200", *target, selector[0], selector[1] + first]
    )


def _warn_of_cost(options: argparse.Namespace) -> None:
    chips = parse_slice(options.accelerator).chips * options.slices
    print(
        f"gke.py: {chips} chips; their node pools are billed, whether a run uses them or not; `vilam3 plan` "
        "says how long and how dear a run is",
        file=sys.stderr,
    )


def _run(options: argparse.Namespace, command: list[str], text: str | None = None) -> int:
    if options.dry_run:
        if text is not None:
            print(f"{shlex.join(command)} <<'MANIFEST'\n{text}MANIFEST")
        else:
            print(shlex.join(command))
        return 0
    if not shutil.which(command[0]):
        raise UsageError(
            f"{command[0]} is not installed or not on PATH; install it, or look first with --dry-run"
        )
    return subprocess.run(command, input=text, text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
