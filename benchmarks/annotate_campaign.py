"""A campaign of tiny records under fire: poison, and kills of the whole run; nothing may be lost.

    python benchmarks/annotate_campaign.py --records 200000 --kills 20 --folder /scratch/campaign
    python benchmarks/annotate_campaign.py --ray-only --ray-records 2000 --folder /scratch/campaign

Makes a folder of tiny pictures, of which 1 % are poison in five equal parts: damaged files, pictures that
kill the worker, that run out of memory always, that raise, that the expert declines. Starts the annotation,
kills its driver with SIGKILL at random moments spread over the run, starts it again, until it ends by itself.
Samples the memory of driver and workers all the while. Then compares the store with what it must hold, and
counts how often each picture was run. With Ray: records per second with 1 and 4 workers, by an expert
that waits for `--seconds` a picture, as for a GPU. Prints JSON.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

EXPERT = """
import os, signal, time
import numpy as np
from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.descriptors import Descriptor
from vilam3_jax.data.experts.cards import Card

CAMPAIGN = Descriptor(
    card=Card("CAMPAIGN", (), "any", "classification", "tells the mean", "perfect"),
    version="1", input="image", kind="classification", factory="campaign_expert:Campaign")
LOG = os.open(os.environ["CAMPAIGN_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
SECONDS = float(os.environ.get("CAMPAIGN_SECONDS", "0"))


class Campaign:
    def __init__(self, weights):
        pass

    def run(self, data, args):
        number = int.from_bytes(data[0, 0].tobytes() + data[0, 1].tobytes()[:1], "little")
        poison = int(data[1, 0, 0])
        os.write(LOG, number.to_bytes(4, "little"))
        if poison == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if poison == 2:
            raise MemoryError("tiny, yet too large")
        if poison == 3:
            raise RuntimeError("a fault of the model")
        if poison == 4:
            raise ExpertFailure("not my field")
        if SECONDS:
            time.sleep(SECONDS)  # of 0 seconds it would give the core away
        return Output(probabilities={"mean": float(np.mean(data)) / 255})
"""
DRIVER = """
import sys
import campaign_expert
from vilam3_experts.annotate import Engine, annotate
engine = Engine(workers=int(sys.argv[3]))
summary = annotate(campaign_expert.CAMPAIGN, sys.argv[1], sys.argv[2], engine=engine)
print(summary.line())
print("\\n".join(summary.table()), file=sys.stderr)
"""
POISON = 100  # one in so many
KINDS = 5


def write_png(path: Path, number: int, poison: int) -> None:
    """A picture of 4 x 4 pixels that states its number, and its poison."""
    pixels = bytearray(48)
    pixels[0:4] = number.to_bytes(4, "little")
    pixels[12] = poison
    rows = b"".join(b"\0" + pixels[n : n + 12] for n in range(0, 48, 12))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    )


def make(folder: Path, records: int) -> dict[str, int]:
    """Writes the pictures; returns what must become of them."""
    expected: collections.Counter[str] = collections.Counter()
    for number in range(records):
        place = folder / f"{number // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{number:07d}.png"
        poison = 1 + number // POISON % KINDS if number % POISON == POISON - 1 else 0
        if poison == KINDS:
            path.write_bytes(b"\x89PNG\r\n\x1a\n")
        else:
            write_png(path, number, poison)
        expected["unreadable" if poison == KINDS else "failed" if poison else "ok"] += 1
    return dict(expected)


class Memory:
    """Resident memory of a process and its children, over time."""

    def __init__(self) -> None:
        self.driver: list[tuple[float, int]] = []
        self.worker: list[tuple[float, int]] = []

    def sample(self, pid: int) -> None:
        """Adds one sample of each."""
        now = time.monotonic()
        if size := _resident(pid):
            self.driver.append((now, size))
        below = [size for child in _descendants(pid) if (size := _resident(child))]
        if below:
            self.worker.append((now, max(below)))

    @staticmethod
    def summary(samples: list[tuple[float, int]]) -> dict[str, float]:
        """MiB: early and late median of the steady part, and the peak."""
        steady = [size for _, size in samples[len(samples) // 10 :]] or [0]
        tenth = max(1, len(steady) // 10)
        return {
            "early_mib": round(statistics.median(steady[:tenth]) / 2**20, 1),
            "late_mib": round(statistics.median(steady[-tenth:]) / 2**20, 1),
            "peak_mib": round(max(size for _, size in samples) / 2**20, 1) if samples else 0.0,
        }


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _descendants(pid: int) -> list[int]:
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    except OSError:
        pass
    return found


def run_once(
    args: argparse.Namespace, environment: dict[str, str], store: Path, kill_at: int | None, memory: Memory
) -> tuple[float, bool]:
    """Starts the run, kills it when the log has `kill_at` bytes; (seconds, whether it was killed)."""
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(args.folder / "data"),
        str(store),
        str(args.workers),
    ]
    log = Path(environment["CAMPAIGN_LOG"])
    began = time.monotonic()
    with open(args.folder / "errors.txt", "ab") as errors:
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        sampled = 0.0
        while driver.poll() is None:
            if time.monotonic() - sampled > 0.5:
                memory.sample(driver.pid)
                sampled = time.monotonic()
            if kill_at is not None and log.exists() and log.stat().st_size >= kill_at:
                driver.kill()
                driver.wait()
                return time.monotonic() - began, True
            time.sleep(0.05)
    if driver.returncode != 0:
        raise SystemExit(f"the run ended with {driver.returncode}; see {args.folder}/errors.txt")
    return time.monotonic() - began, False


def campaign(args: argparse.Namespace, environment: dict[str, str]) -> dict[str, object]:
    """Runs it under fire and says what is left."""
    from vilam3_jax.data.experts.store import AnnotationStore

    expected = make(args.folder / "data", args.records)
    store = args.folder / "store"
    chooser = random.Random(args.seed)
    moments = sorted(chooser.uniform(0.0, 0.98) for _ in range(args.kills))
    memory, seconds, kills, last = Memory(), 0.0, 0, Memory()
    for moment in [*moments, None]:
        # What was run since the last kill without a commit is run again and logged again.
        size = Path(environment["CAMPAIGN_LOG"])
        logged = size.stat().st_size if size.exists() else 0
        kill_at = None if moment is None else max(int(4 * args.records * moment), logged + 4 * 50)
        last = Memory()
        took, killed = run_once(args, environment, store, kill_at, last)
        seconds += took
        kills += killed
        if len(last.driver) > len(memory.driver):
            memory = last
        if not killed:
            break
    runs: collections.Counter[int] = collections.Counter()
    data = Path(environment["CAMPAIGN_LOG"]).read_bytes()
    runs.update(struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))
    opened = AnnotationStore(store)
    found: collections.Counter[str] = collections.Counter()
    wrong = 0
    for key in opened.keys():  # noqa: SIM118
        record = opened.get(*key)
        found[record.status if record else "lost"] += 1
    lost = expected["ok"] - found["ok"] + expected["failed"] - found["failed"]
    clean = {number: count for number, count in runs.items() if number % POISON != POISON - 1}
    again = sum(count - 1 for count in clean.values())
    wrong = sum(1 for number in range(args.records) if number % POISON != POISON - 1 and number not in runs)
    before = len(data)
    started = time.monotonic()
    run_once(args, environment, store, None, Memory())
    restart = time.monotonic() - started
    computed_again = len(Path(environment["CAMPAIGN_LOG"]).read_bytes()) - before
    return {
        "records": args.records,
        "expected": expected,
        "found": dict(found),
        "lost": lost,
        "never_run": wrong,
        "kills": kills,
        "run_again": again,
        "run_again_per_kill": round(again / max(1, kills), 1),
        "seconds": round(seconds, 1),
        "records_per_second": round(args.records / seconds, 1),
        "driver": Memory.summary(memory.driver),
        "worker": Memory.summary(memory.worker),
        "finished_run_started_again": {"seconds": round(restart, 1), "computed": computed_again // 4},
    }


def ray_ratio(args: argparse.Namespace, environment: dict[str, str]) -> dict[str, object]:
    """Records per second with 1 and 4 workers of one Ray cluster on this machine."""
    import ray

    sys.path.insert(0, str(args.folder / "plugin"))
    os.environ.update(environment | {"CAMPAIGN_SECONDS": str(args.seconds)})
    import campaign_expert  # type: ignore[import-not-found]
    from vilam3_experts.annotate import Engine, annotate

    data = args.folder / "ray_data"
    count = args.ray_records
    for number in range(count):
        data.mkdir(exist_ok=True)
        write_png(data / f"{number:07d}.png", number, 0)
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    rates = {}
    for workers in (1, 4):
        store = args.folder / f"ray_store_{workers}"
        seen: list[float] = []
        began = time.monotonic()
        summary = annotate(
            campaign_expert.CAMPAIGN, data, store, engine=Engine("ray", workers=workers),
            show=lambda *_, seen=seen: seen.append(time.monotonic()),
        )  # fmt: skip
        whole = time.monotonic() - began
        assert summary.counts == {"annotated": count}, summary.line()
        # From the first result on: starting actors takes the same time for any number of records.
        first = seen[0]
        after = sum(moment > first + 0.5 for moment in seen)
        rates[workers] = {
            "seconds": round(whole, 1),
            "to_first_result": round(first - began, 1),
            "records_per_second": round(count / whole, 1),
            "steady_records_per_second": round(after / max(1e-9, seen[-1] - first), 1),
        }
    ray.shutdown()
    steady = {n: float(rate["steady_records_per_second"]) for n, rate in rates.items()}
    return {
        "seconds_per_record": args.seconds,
        "records": count,
        "workers": rates,
        "ratio_4_to_1": round(steady[4] / steady[1], 2),
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="is emptied; on a fast disk")
    parser.add_argument("--ray-only", action="store_true")
    parser.add_argument("--ray-records", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0.05, help="that a picture takes, with Ray (0.05)")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    (args.folder / "plugin").mkdir(parents=True)
    (args.folder / "plugin" / "campaign_expert.py").write_text(EXPERT)
    paths = [str(args.folder / "plugin"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CAMPAIGN_LOG": str(args.folder / "log"),
    }
    result: dict[str, object] = {"machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result |= ray_ratio(args, environment) if args.ray_only else campaign(args, environment)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
