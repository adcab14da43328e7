"""The arguments of commands that may run as several processes; see `processes`."""

from __future__ import annotations

import argparse
from typing import Any

FLAGS = {
    "coordinator_address": "HOST:PORT of process 0; only with several processes.",
    "num_processes": "Number of processes of the run.",
    "process_id": "Number of this process, from 0.",
    "distributed": "Take the processes from the environment (TPU pods, Slurm, Open MPI).",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `FLAGS`."""
    for name, kind in (("coordinator_address", str), ("num_processes", int), ("process_id", int)):
        parser.add_argument(f"--{name}", type=kind, help=FLAGS[name])
    parser.add_argument("--distributed", action="store_true", help=FLAGS["distributed"])


def argument_values(options: argparse.Namespace) -> dict[str, Any]:
    """Values of `FLAGS`, the keyword arguments of `processes.group`."""
    return {name: getattr(options, name) for name in FLAGS}
