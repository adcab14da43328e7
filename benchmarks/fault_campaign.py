"""Kills training at random moments and checks that resumed runs equal an uninterrupted one.

    python benchmarks/fault_campaign.py [--kills=50] [--processes=1] [--seed=0] [--dir=EMPTY_FOLDER]

Trains a tiny model on phantoms without interruption, then again with kill -9 (sometimes SIGTERM) of one
process at a random moment: during start-up, between steps, or while a checkpoint is written. After every
fifth kill the newest checkpoint is truncated as well. The same command then resumes the run. Loss, gradient
norm and batch (a digest of its tokens and images) of every logged step must equal those of the uninterrupted
run bit for bit: no sample is lost or repeated. Prints a summary; exits with 1 on the first difference.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STEPS = 240
COMPARED = ("loss", "grad_norm", "tokens", "supervised", "batch")
PATIENCE = 900  # seconds for anything


def worker(argv: list[str]) -> int:
    """The train program, with a digest of each batch added to the metrics."""
    from vilam3_jax import train
    from vilam3_jax.data.batches import arrays
    from vilam3_jax.training import device_put, writers

    put, write = device_put.DevicePut.__call__, writers.JsonLines.write
    digests = collections.deque()  # of batches in flight; steps are logged in order

    def noted_put(self, batch):
        found = hashlib.sha256()
        for _, values in sorted(arrays(batch).items()):
            found.update(np.ascontiguousarray(values).tobytes())
        digests.append(found.hexdigest())
        return put(self, batch)

    def noted_write(self, step, values):
        write(self, step, {**values, "batch": digests.popleft()} if "loss" in values else values)

    device_put.DevicePut.__call__ = noted_put
    writers.JsonLines.write = noted_write
    return train.main(argv)


def make_world(root: Path) -> None:
    """Data and tokenizer."""
    from vilam3_jax.datasets import phantoms, prepare, train_tokenizer

    phantoms.make_phantoms(root / "samples", seed=1, num=3)
    prepare.main(["quickstart", "--source", f"{root}/samples", "--out", f"{root}/data", "--size", "smoke"])
    train_tokenizer.main(["--data", f"{root}/data", "--out", f"{root}/tokenizer", "--vocab_size=600"])


def start(root: Path, workdir: Path, processes: int) -> list[subprocess.Popen]:
    """Starts the run's processes."""
    settings = {
        "data.path": root / "data",
        "model.tokenizer": root / "tokenizer",
        "data.seq_len": 128,
        "data.global_rows": 4,
        "data.loader_shards": 4,
        "data.experts": "off",
        "loss_chunk": 64,
        "mesh.cpu_devices": 2 // processes,
        "num_steps": STEPS,
        "checkpoint_every": 7,
        "model.llm.num_layers": 1,
    }
    argv = ["--config=configs/stage3_instruct.py:tiny", f"--workdir={workdir}", "--quiet"]
    argv += [f"--config.{key}={value}" for key, value in settings.items()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator_address=localhost:{free.getsockname()[1]}"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = []
    for number in range(processes):
        own = [address, f"--num_processes={processes}", f"--process_id={number}"] if processes > 1 else []
        with (root / f"said.{number}").open("a") as said:
            program = [sys.executable, __file__, "--worker", *argv, *own]
            started.append(
                subprocess.Popen(
                    program, stdout=said, stderr=said, env={**os.environ, **cache}, cwd=Path.cwd()
                )
            )
    return started


def rows(workdir: Path) -> dict[int, dict]:
    """Step → what was logged."""
    from vilam3_jax.training import telemetry

    return {row["step"]: row for row in telemetry.read_metrics(workdir) if "loss" in row}


def finish(running: list[subprocess.Popen]) -> list[int]:
    """Waits for all; returns their exit codes."""
    return [process.wait(timeout=PATIENCE) for process in running]


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("orbax-checkpoint-tmp" in name for name in os.listdir(folder))


def strike(running: list[subprocess.Popen], workdir: Path, moment: str, chance: random.Random) -> str | None:
    """Waits for the moment and sends the signal; returns its name, None if the run ended before."""
    before = max(rows(workdir), default=0)
    alive = lambda: all(process.poll() is None for process in running)  # noqa: E731
    deadline = time.monotonic() + PATIENCE
    if moment == "start":
        time.sleep(chance.uniform(0.0, 15.0))
    else:
        wanted = before + chance.randrange(1, 25)
        while alive() and max(rows(workdir), default=0) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        while moment == "save" and alive() and not saving(workdir) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.1))
    if not alive():
        return None
    sent = signal.SIGTERM if moment == "steps" and chance.random() < 0.2 else signal.SIGKILL
    chance.choice(running).send_signal(sent)
    return sent.name


def tear(workdir: Path, chance: random.Random) -> bool:
    """Cuts or removes a file of the newest checkpoint, if there is another one."""
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit())
    if len(steps) < 2:
        return False
    files = sorted((workdir / "checkpoints" / str(steps[-1]) / "state").rglob("*"))
    file = chance.choice([path for path in files if path.is_file() and path.stat().st_size > 1])
    if chance.random() < 0.5:
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    return True


def check(found: dict[int, dict], expected: dict[int, dict]) -> None:
    """Every logged step as in the unbroken run."""
    assert sorted(found) == list(range(1, len(found) + 1)), f"steps {sorted(found)}"
    for step, row in found.items():
        for key in COMPARED:
            if row[key] != expected[step][key]:
                raise SystemExit(f"step {step}: {key} is {row[key]}, unbroken {expected[step][key]}")


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path)
    values = parser.parse_args()
    root = values.dir or Path(tempfile.mkdtemp(prefix="vilam3_faults_"))
    chance = random.Random(values.seed)
    began = time.monotonic()
    if not (root / "tokenizer").exists():
        make_world(root)
    unbroken = root / f"unbroken_{values.processes}"
    if set(finish(start(root, unbroken, values.processes))) != {0}:
        raise SystemExit(f"the unbroken run failed; see {root}/said.0")
    expected = rows(unbroken)
    print(f"unbroken: {len(expected)} steps, {time.monotonic() - began:.0f} s", flush=True)

    counts: collections.Counter[str] = collections.Counter()
    workdir = root / f"broken_{values.processes}"
    shutil.rmtree(workdir, ignore_errors=True)
    while counts["SIGKILL"] + counts["SIGTERM"] < values.kills:
        moment = chance.choices(("start", "steps", "save"), (0.2, 0.4, 0.4))[0]
        running = start(root, workdir, values.processes)
        try:
            sent = strike(running, workdir, moment, chance)
            codes = finish(running)
        finally:
            for process in running:
                process.kill()
        found = rows(workdir)
        check(found, expected)
        counts["checked"] += len(found)
        if sent == "SIGTERM" and max(found) < STEPS and set(codes) != {0}:
            raise SystemExit(f"SIGTERM led to exit codes {codes}; see {root}/said.0")
        if sent is None:
            if set(codes) != {0} or len(found) != STEPS:
                raise SystemExit(f"a resumed run ended with {codes} at step {len(found)}; see {root}/said.0")
            counts["finished"] += 1
            shutil.rmtree(workdir)
            continue
        counts[sent] += 1
        counts[moment] += 1
        kills = counts["SIGKILL"] + counts["SIGTERM"]
        if kills % 5 == 0:
            counts["torn"] += tear(workdir, chance)
        print(
            f"{kills}: {sent} ({moment}) at step {max(found, default=0)}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    if set(finish(start(root, workdir, values.processes))) != {0}:
        raise SystemExit(f"the last resumed run failed; see {root}/said.0")
    check(rows(workdir), expected)
    assert len(rows(workdir)) == STEPS
    print(json.dumps({"processes": values.processes, "seconds": round(time.monotonic() - began), **counts}))
    if values.dir is None:
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
