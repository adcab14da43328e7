"""Fault injection for annotation runs: bad inputs, and kills of the whole run; no record may be lost.

    python benchmarks/annotate_campaign.py --records 200000 --kills 20 --folder /scratch/campaign
    python benchmarks/annotate_campaign.py --ray-only --ray-records 2000 --folder /scratch/campaign

Writes a folder of tiny images, of which 1 % are bad, in five equal parts: damaged files, and images that kill
the worker, run out of memory, raise, or are declined by the expert. Kills the driver with SIGKILL at random
times and restarts it until it finishes, while sampling the memory of driver and workers. Then compares the
store with the expected content, and counts how often each image was run. With Ray: records per second with 1
and 4 workers, for an expert that sleeps `--seconds` per image, as if it waited for a GPU. Prints JSON.
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
from pathlib import Path

import numpy as np
from PIL import Image

EXPERT = """
import os, signal, time
import numpy as np
from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.descriptors import Descriptor
from vilam3_jax.data.experts.cards import Card

CAMPAIGN = Descriptor(
    card=Card("CAMPAIGN", (), "any", "classification", "returns the mean", "perfect"),
    version="1", input="image", kind="classification", factory="campaign_expert:Campaign")
LOG = os.open(os.environ["CAMPAIGN_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
SECONDS = float(os.environ.get("CAMPAIGN_SECONDS", "0"))


class Campaign:
    def __init__(self, weights):
        pass

    def run(self, data, args):
        number = int.from_bytes(data[0, 0].tobytes() + data[0, 1].tobytes()[:1], "little")
        fault = int(data[1, 0, 0])
        os.write(LOG, number.to_bytes(4, "little"))
        if fault == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == 2:
            raise MemoryError("out of memory")
        if fault == 3:
            raise RuntimeError("an error of the model")
        if fault == 4:
            raise ExpertFailure("declined")
        if SECONDS:
            time.sleep(SECONDS)  # sleep(0) would yield the core
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
PERIOD = 100  # one image in so many is bad
FAULTS = 5


def write_png(path: Path, number: int, fault: int) -> None:
    """An image of 4 x 4 pixels that encodes its number and its fault."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels.reshape(-1)[:4] = list(number.to_bytes(4, "little"))
    pixels[1, 0, 0] = fault
    Image.fromarray(pixels).save(path, compress_level=1)


def make(folder: Path, records: int) -> dict[str, int]:
    """Writes the images; returns the expected number of records by status."""
    expected: collections.Counter[str] = collections.Counter()
    for number in range(records):
        place = folder / f"{number // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{number:07d}.png"
        fault = 1 + number // PERIOD % FAULTS if number % PERIOD == PERIOD - 1 else 0
        if fault == FAULTS:
            path.write_bytes(b"\x89PNG\r\n\x1a\n")
        else:
            write_png(path, number, fault)
        expected["unreadable" if fault == FAULTS else "failed" if fault else "ok"] += 1
    return dict(expected)


class Memory:
    """Resident memory of a process and of its largest descendant, in bytes, over time."""

    def __init__(self) -> None:
        self.driver: list[int] = []
        self.worker: list[int] = []

    def sample(self, pid: int) -> None:
        if size := _resident(pid):
            self.driver.append(size)
        if sizes := [size for child in _descendants(pid) if (size := _resident(child))]:
            self.worker.append(max(sizes))

    @staticmethod
    def summary(samples: list[int]) -> dict[str, float]:
        """MiB: the early and late median after the first tenth, and the peak."""
        steady = samples[len(samples) // 10 :] or [0]
        tenth = max(1, len(steady) // 10)
        figures = {
            "early_mib": statistics.median(steady[:tenth]),
            "late_mib": statistics.median(steady[-tenth:]),
            "peak_mib": max(samples, default=0),
        }
        return {name: round(value / 2**20, 1) for name, value in figures.items()}


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
    """Starts the run and kills it when the log has `kill_at` bytes; (seconds, whether it was killed)."""
    command = [sys.executable, "-c", DRIVER, str(args.folder / "data"), str(store), str(args.workers)]
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
    """Runs with kills and compares the store with the expected content."""
    from vilam3_jax.data.experts.store import AnnotationStore

    expected = make(args.folder / "data", args.records)
    store, log = args.folder / "store", Path(environment["CAMPAIGN_LOG"])
    random_times = random.Random(args.seed)
    times = sorted(random_times.uniform(0.0, 0.98) for _ in range(args.kills))
    memory, seconds, kills = Memory(), 0.0, 0
    for fraction in [*times, None]:
        # Inputs that ran after the last commit before a kill run again, and are logged again.
        logged = log.stat().st_size if log.exists() else 0
        kill_at = None if fraction is None else max(int(4 * args.records * fraction), logged + 4 * 50)
        last = Memory()
        took, killed = run_once(args, environment, store, kill_at, last)
        seconds += took
        kills += killed
        if len(last.driver) > len(memory.driver):
            memory = last
        if not killed:
            break
    data = log.read_bytes()
    runs = collections.Counter(struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))
    opened = AnnotationStore(store)
    found: collections.Counter[str] = collections.Counter()
    for key in opened.keys():  # noqa: SIM118
        record = opened.get(*key)
        found[record.status if record else "lost"] += 1
    lost = expected["ok"] - found["ok"] + expected["failed"] - found["failed"]
    good = [number for number in range(args.records) if number % PERIOD != PERIOD - 1]
    again = sum(runs[number] - 1 for number in good if number in runs)
    restart, _ = run_once(args, environment, store, None, Memory())
    computed_again = log.stat().st_size - len(data)
    return {
        "records": args.records,
        "expected": expected,
        "found": dict(found),
        "lost": lost,
        "never_run": sum(number not in runs for number in good),
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
        # The steady rate excludes the start of the actors, whose time does not depend on the records.
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="on a fast disk; is emptied first")
    parser.add_argument("--ray-only", action="store_true")
    parser.add_argument("--ray-records", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0.05, help="per image, with Ray (0.05)")
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
