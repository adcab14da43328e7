"""Time to open an annotation store of a million records, and to look records up.

Run: python benchmarks/annotation_store.py [--records=1000000] [--folder=DIR]

Writes a store of tiny records, 256 per shard, and measures it in new processes, as written and compacted:
time to open (wall clock and CPU), random look-ups of record bytes, decoded records and a missing key, memory
beyond the imports, time to reopen in a worker process, and size on disk. The page cache is warm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationWriter

RECORDS_PER_SHARD = 256
LOOKUPS = 20_000

# Arguments: folder, number of records, look-ups.
MEASURE = """
import hashlib, json, random, sys, time
from vilam3_jax.data.experts.store import AnnotationStore
folder, records, lookups = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) / 1024

def times(function, keys):
    taken = []
    for key in keys:
        start = time.perf_counter()
        function(key)
        taken.append(time.perf_counter() - start)
    taken.sort()
    return {"median_us": taken[len(taken) // 2] * 1e6, "p99_us": taken[len(taken) * 99 // 100] * 1e6}

def raw(key):
    found = store._index.find(key)
    return store._readers.read(found.shard, found.record)

before = resident()
start, cpu = time.perf_counter(), time.process_time()
store = AnnotationStore(folder)
count = len(store)
result = {"open_s": time.perf_counter() - start, "open_cpu_s": time.process_time() - cpu}
assert count == records, count
result["memory_mib"] = resident() - before
chosen = random.Random(1).choices(range(records), k=lookups)
keys = [(hashlib.sha256(str(i).encode()).hexdigest(), "CXR", "") for i in chosen]
result["bytes"] = times(raw, keys)
result["decoded"] = times(lambda key: store.get(*key), keys)
result["missing"] = times(lambda key: store.get("0" * 64, key[1]), keys)
state = store.__getstate__()
start = time.perf_counter()
object.__new__(AnnotationStore).__setstate__(state)
result["reopen_s"] = time.perf_counter() - start
print(json.dumps(result))
"""

# Argument: folder. Prints seconds and peak MiB.
COMPACT = """
import resource, sys, time
from vilam3_jax.data.experts.store import compact
start = time.perf_counter()
compact(sys.argv[1])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write_store(folder: Path, records: int) -> None:
    with AnnotationWriter(
        folder, records_per_shard=RECORDS_PER_SHARD, seconds_per_shard=float("inf")
    ) as writer:
        for number in range(records):
            key = hashlib.sha256(str(number).encode()).hexdigest()
            writer.write(Annotation(key, "CXR", version="1", probabilities={"effusion": 0.25}))


def run(code: str, *arguments: object) -> str:
    """Runs Python code in a new process; returns its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def row(name: str, folder: Path, records: int) -> str:
    """Measures a store; returns a line of the table."""
    measured = json.loads(run(MEASURE, folder, records, LOOKUPS))
    index, shards = (
        sum(path.stat().st_size for path in folder.glob(f"*{suffix}")) / (1 << 20)
        for suffix in (".index", ".array_record")
    )
    cells = [
        f"{measured['open_s']:8.2f} {measured['open_cpu_s']:8.2f}",
        f"{measured['bytes']['median_us']:8.0f} {measured['bytes']['p99_us']:8.0f}",
        f"{measured['decoded']['median_us']:8.0f} {measured['decoded']['p99_us']:8.0f}",
        f"{measured['missing']['median_us']:8.0f}",
        f"{measured['memory_mib']:8.0f}",
        f"{measured['reopen_s']:8.2f}",
        f"{index:8.0f} {shards:8.0f}",
    ]
    return f"{name:12}" + " ".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write the store (default: a temporary folder)")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="vilam3-store-", dir=options.folder))
    try:
        print("Open: seconds, wall clock and CPU. Look-ups: microseconds, median and p99.")
        head = "store             open s, CPU    bytes           decoded      missing   MiB"
        print(head + "  reopen s  index, shards MiB", flush=True)
        start = time.perf_counter()
        write_store(folder, options.records)
        written = time.perf_counter() - start
        print(row("as written", folder, options.records), flush=True)
        seconds, memory = map(float, run(COMPACT, folder).split())
        print(row("compacted", folder, options.records), flush=True)
        print(f"written in {written:.1f} s; compacted in {seconds:.1f} s, peak memory {memory:.0f} MiB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
