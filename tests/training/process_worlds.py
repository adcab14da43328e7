"""Runs of the train program in several processes, on small real files."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vilam3_jax.datasets import phantoms, prepare, train_tokenizer
from vilam3_jax.runtime.paths import PathLike
from vilam3_jax.training import telemetry

ROOT = Path(__file__).parents[2]


def make_world(root: Path) -> Path:
    """Phantoms, their datasets, a tokenizer, and a cache of compiled programs for all runs."""
    phantoms.make_phantoms(root / "samples", seed=1, num=3)
    prepare.main(["quickstart", "--source", f"{root}/samples", "--out", f"{root}/data", "--size", "smoke"])
    train_tokenizer.main(["--data", str(root / "data"), "--out", str(root / "tokenizer"), "--vocab_size=600"])
    return root


def arguments(world: Path, workdir: PathLike, stage: str = "stage3_instruct", **settings: Any) -> list[str]:
    settings = {
        "data.path": world / "data",
        "model.tokenizer": world / "tokenizer",
        "data.seq_len": 128,
        "data.global_rows": 8,
        "data.loader_shards": 8,
        "data.global_pairs": 16,
        "data.experts": "off",
        "loss_chunk": 32,
        **settings,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config=configs/{stage}.py:tiny", f"--workdir={workdir}", "--quiet", *flags]


def environment(world: Path) -> dict[str, str]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(world / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **cache, "PYTHON": sys.executable, "TF_CPP_MIN_LOG_LEVEL": "3"}


def start(world: Path, processes: int, argv: list[str]) -> subprocess.Popen:
    """Starts one process directly, several with the launcher."""
    one = [sys.executable, "-m", "vilam3_jax.train"]
    several = [str(ROOT / "launch" / "local.sh"), str(processes)]
    return subprocess.Popen(
        [*(one if processes == 1 else several), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(world),
        cwd=ROOT,
    )


def run(world: Path, processes: int, argv: list[str], code: int = 0, timeout: float = 1200) -> str:
    """Runs to the end; returns stderr."""
    process = start(world, processes, argv)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, (process.returncode, out[-2000:], err[-4000:])
    return err


def run_script(
    script: str, processes: int, *arguments: str, env: Mapping[str, str] | None = None
) -> list[tuple[int, str, str]]:
    """Runs a script in a group of processes; returns exit code, stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    flags = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}"]
    running = [
        subprocess.Popen(
            [*program, *flags, f"--process_id={number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**(env or os.environ), "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
        )
        for number in range(processes)
    ]
    said = [process.communicate(timeout=900) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def losses(workdir: PathLike) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in telemetry.read_metrics(workdir) if "loss" in row}


def children(pid: int) -> list[int]:
    """The children of a launcher, ordered by process id of the run."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        number = next((w.split("=")[1] for w in words if w.startswith("--process_id=")), None)
        if parent == pid and number is not None:
            found[int(number)] = int(entry.name)
    return [found[number] for number in sorted(found)]


def copy_run(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
