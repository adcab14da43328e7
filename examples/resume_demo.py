"""A demonstration of exact resumption: `make resume-demo`.

Trains a tiny model on a packed mixture with two processes, kills one of them, and resumes twice from the last
checkpoint: with one process on another mesh, and with two processes on the same mesh. Samples and losses of
every step are compared with those of a run that nothing interrupted. Exits with 1 if they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SAVED_EVERY, KILLED_AFTER = 8, 4, 6
TOLERANCE = 1e-5  # relative, of losses on another mesh: sums have another order there
TWO_PROCESSES = {"mesh.fsdp": 2, "mesh.tensor": 1, "mesh.cpu_devices": 1}
ONE_PROCESS = {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.cpu_devices": 4}
PATIENCE = 600  # seconds
FORKSERVER = multiprocessing.get_context("forkserver")
LIBRARIES = ("orbax.checkpoint", "grain.python", "tokenizers", "transformers")
SAMPLES = "samples_of_process_{}.jsonl"


def worker(argv: list[str], notes: Path, log: Path) -> None:
    """`vilam3 train` with its output in `log`; writes a digest of every sample of a step to `notes`."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    from vilam3_jax import train
    from vilam3_jax.training.device_put import DevicePut

    class Noting(DevicePut):
        def __call__(self, batch: Any) -> Any:
            with notes.open("a") as file:
                file.write(json.dumps(sorted(digests(batch))) + "\n")
            return super().__call__(batch)

    train.DevicePut = Noting
    sys.exit(train.main(argv))


def digests(batch: Any) -> Iterator[str]:
    """One digest for every sample of packed rows (its tokens), and one for every image."""
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            yield _digest(tokens[segments == segment])
    for image in batch.images[batch.image_valid]:
        yield _digest(image)


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def make_world(root: Path) -> None:
    """Generates scans, their datasets and a tokenizer."""
    from vilam3_jax.datasets import phantoms, prepare, train_tokenizer

    phantoms.make_phantoms(root / "samples", seed=1, num=3)
    prepare.main(["quickstart", "--source", f"{root}/samples", "--out", f"{root}/data", "--size", "smoke"])
    train_tokenizer.main(["--data", f"{root}/data", "--out", f"{root}/tokenizer", "--vocab_size=600"])


@contextlib.contextmanager
def started(root: Path, name: str, processes: int, mesh: Mapping[str, int]) -> Iterator[list[Any]]:
    """The processes of a run in `root/name`, which are killed at the end of the context."""
    settings = {
        **{"data.path": root / "data", "model.tokenizer": root / "tokenizer", "data.experts": "off"},
        **{"data.seq_len": 128, "data.global_rows": 8, "data.loader_shards": 8, "loss_chunk": 64},
        **{"num_steps": STEPS, "checkpoint_every": SAVED_EVERY, "checkpoints_kept": STEPS, "eval_every": 0},
        **{"data.mixture": "(('instruct', 2), ('captions', 1))"},
        **mesh,
    }
    argv = ["--config=configs/stage3_instruct.py:tiny", f"--workdir={root / name}", "--quiet"]
    argv += [f"--config.{key}={value}" for key, value in settings.items()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"--coordinator_address=localhost:{free.getsockname()[1]}"
    (root / name).mkdir(exist_ok=True)
    for notes in (root / name).glob(SAMPLES.format("*")):
        notes.unlink()
    running = []
    try:
        for number in range(processes):
            own = [coordinator, f"--num_processes={processes}", f"--process_id={number}"]
            arguments = (
                [*argv, *(own if processes > 1 else [])],
                root / name / SAMPLES.format(number),
                root / f"{name}.{number}.log",
            )
            running.append(FORKSERVER.Process(target=worker, args=arguments))
            running[-1].start()
        yield running
    finally:
        for process in running:
            process.kill()


def finish(root: Path, name: str, running: list[Any]) -> None:
    """Waits for the end of a run."""
    deadline = time.monotonic() + PATIENCE
    for process in running:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in running]
    if set(codes) != {0}:
        said = (root / f"{name}.0.log").read_text()
        raise SystemExit(f"error: the run {name} ended with exit codes {codes}:\n{said}")


def newest_checkpoint(workdir: Path) -> int:
    """The step from which a run resumes."""
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def losses(workdir: Path) -> dict[int, float]:
    """Step → loss."""
    from vilam3_jax.training import telemetry

    return {row["step"]: row["loss"] for row in telemetry.read_metrics(workdir) if "loss" in row}


def samples(workdir: Path) -> list[list[str]]:
    """The digests of every step since the start of the processes, sorted."""
    parts = [file.read_text().splitlines() for file in sorted(workdir.glob(SAMPLES.format("*")))]
    return [sorted(d for line in lines for d in json.loads(line)) for lines in zip(*parts, strict=True)]


def kill_one(root: Path, name: str, running: list[Any]) -> None:
    """Kills the second process after KILLED_AFTER steps; the first one must not go on alone."""
    deadline = time.monotonic() + PATIENCE
    while max(losses(root / name), default=0) < KILLED_AFTER:
        if time.monotonic() > deadline or any(process.exitcode is not None for process in running):
            raise SystemExit(f"error: the run {name} stopped early; see {root}/{name}.0.log")
        time.sleep(0.05)
    running[1].kill()
    running[1].join()
    running[0].join(2)
    running[0].kill()  # it may still wait for the other one
    running[0].join()


def compare(root: Path, name: str, resumed: int, tolerance: float) -> bool:
    """Prints how a resumed run compares with the unbroken one; returns whether it is the same run."""
    expected, found = losses(root / "unbroken"), losses(root / name)
    after = samples(root / "unbroken")[resumed:]
    seen = samples(root / name)
    same_samples = len(after) == STEPS - resumed and seen == after
    gap = max(abs(found[step] - expected[step]) / abs(expected[step]) for step in expected)
    count = sum(map(len, after))
    print(
        f"  samples and images of steps {resumed + 1} to {STEPS}: "
        + (f"all {count} are those of the unbroken run" if same_samples else "they DIFFER")
    )
    bound = f"within {tolerance:g}" if tolerance else "bitwise equal"
    same_losses = sorted(found) == sorted(expected) and gap <= tolerance
    print(
        f"  losses of all {STEPS} steps: "
        + (f"{bound} (largest difference {gap:.1e})" if same_losses else f"they DIFFER by {gap:.1e}")
    )
    print(f"  last loss: {found[STEPS]:.7f}, unbroken {expected[STEPS]:.7f}")
    return same_samples and same_losses


def preload(root: Path) -> None:
    """Lets the processes of all runs start from one that has imported the libraries."""
    os.environ |= {
        **{"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"},
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # The killed process leaves its semaphores behind, as it should.
        "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
        # A few steps of a tiny model take less time than optimizing their program.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
    }
    FORKSERVER.set_forkserver_preload(["vilam3_jax.train", *LIBRARIES])


def demonstrate(root: Path) -> int:
    """Runs everything in `root`; returns the exit code."""
    began = time.monotonic()
    preload(root)
    print("0. generated scans, datasets, a tokenizer")
    with (root / "data.log").open("w") as log, contextlib.redirect_stdout(log):
        make_world(root)
    print("1. two processes, mesh fsdp 2, without interruption")
    with started(root, "unbroken", 2, TWO_PROCESSES) as running:
        finish(root, "unbroken", running)
    last = losses(root / "unbroken")[STEPS]
    print(f"   {STEPS} steps of packed rows of two datasets, last loss {last:.7f}")
    print(f"2. the same run again; after step {KILLED_AFTER}, one of its processes is killed (SIGKILL)")
    with started(root, "one_process", 2, TWO_PROCESSES) as running:
        kill_one(root, "one_process", running)
    shutil.copytree(root / "one_process", root / "two_processes")
    resumed = newest_checkpoint(root / "one_process")
    print(f"3. the killed run, resumed at step {resumed}")
    with contextlib.ExitStack() as stack:
        runs = {
            name: stack.enter_context(started(root, name, processes, mesh))
            for name, processes, mesh in (
                ("one_process", 1, ONE_PROCESS),
                ("two_processes", 2, TWO_PROCESSES),
            )
        }
        for name, running in runs.items():
            finish(root, name, running)
    same = True
    for name, tolerance, words in (
        ("one_process", TOLERANCE, "one process, another mesh: fsdp 2 x tensor 2"),
        ("two_processes", 0.0, "two processes, the same mesh"),
    ):
        print(f"   with {words}")
        same &= compare(root, name, resumed, tolerance)
    print(f"{'the runs are the same' if same else 'THE RUNS DIFFER'}; {time.monotonic() - began:.0f} s")
    return 0 if same else 1


def main() -> int:
    """Entry of the demonstration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, help="empty folder that is kept (default: a temporary one)")
    options = parser.parse_args()
    if options.dir:
        options.dir.mkdir(parents=True, exist_ok=True)
        if any(options.dir.iterdir()):
            parser.error(f"--dir {options.dir}: is not empty")
        return demonstrate(options.dir)
    with tempfile.TemporaryDirectory(prefix="vilam3_resume_") as folder:
        return demonstrate(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
