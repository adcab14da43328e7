"""How long does an annotation store of a million records take to open, and a look-up in it?

Run: python benchmarks/annotation_store.py [--records=1000000] [--folder=DIR] [--before=PACKAGE_FOLDER]

Writes a store of tiny records as a writer does, 256 in a shard, and measures it in new processes: as written,
and compacted. Prints the time to open (by the clock, and of CPU: what a machine that has nothing else to do
needs), the time of random look-ups of a record's bytes (`AnnotationStore.get` without decoding), of decoded
records, of a key that is missing, memory beyond the imports, and size on the disk. The pages are warm: the
store was just written.

`--before` is a checkout of a version with one JSON index a shard; the same store is written for it and opened
by it, and the ratios are printed.
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

IN_SHARD = 256
LOOKUPS = 20_000
EXPERT, ARGS, VERSION = "CXR", "", "1"

# Runs by itself: it must work in both versions. Arguments: folder, number of records, look-ups.
MEASURE = """
import hashlib, json, pickle, random, resource, sys, time
try:
    from vilam3_jax.data.experts.store import AnnotationStore
except ImportError:
    from vilam3_jax.data.annotations import AnnotationStore
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
    if hasattr(store, "_index"):
        found = store._index.find(key)
        return store._readers.read(found.shard, found.record)
    entry = store._entries[key]
    return store._readers.read(entry["shard"], entry["record"])

before = resident()
start, busy = time.perf_counter(), time.process_time()
store = AnnotationStore(folder)
count = len(store)
opened, busy = time.perf_counter() - start, time.process_time() - busy
assert count == records, count
memory = resident() - before
chosen = random.Random(1).choices(range(records), k=lookups)
keys = [(hashlib.sha256(str(i).encode()).hexdigest(), "CXR", "") for i in chosen]
result = {"open_s": opened, "open_cpu_s": busy, "memory_mib": memory, "bytes": times(raw, keys)}
result["decoded"] = times(lambda key: store.get(*key), keys)
result["missing"] = times(lambda key: store.get("0" * 64, key[1]), keys)
start = time.perf_counter()
state = pickle.dumps(store)
result["pickled_bytes"], result["pickle_s"] = len(state), time.perf_counter() - start
start = time.perf_counter()
pickle.loads(state)  # what a worker process does with it; made two lines above
result["unpickle_s"] = time.perf_counter() - start
result["max_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(result))
"""


def keys(first: int, count: int) -> list[str]:
    """Content keys of some inputs."""
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(first, first + count)]


def records_like(template: bytes, place: str, names: Sequence[str]) -> list[bytes]:
    """Records that differ from `template` in their input key."""
    return [template.replace(place.encode(), name.encode()) for name in names]


def write_store(folder: Path, records: int) -> None:
    """Writes the store as `AnnotationWriter` does, without encoding every record anew."""
    from vilam3_jax.data.experts import store_files
    from vilam3_jax.data.experts.index import Entry, Index
    from vilam3_jax.data.experts.record import Annotation
    from vilam3_jax.runtime import paths

    place = "f" * 64
    template = Annotation(place, EXPERT, version=VERSION, probabilities={"effusion": 0.25}).to_bytes()
    where, run = paths.as_path(folder), store_files.run_name()
    for number, first in enumerate(range(0, records, IN_SHARD)):
        names = keys(first, min(IN_SHARD, records - first))
        name = f"annotations-{run}-{number:05d}"
        data = records_like(template, place, names)
        shard = store_files.write_shard(where, f"{name}.array_record", iter(data))
        entries = [
            Entry((key, EXPERT, ARGS), VERSION, "ok", bytes.fromhex(key), first + i)
            for i, key in enumerate(names)
        ]
        index = Index()
        index.add_shard(shard, entries)
        (folder / f"{name}.index").write_bytes(index.to_bytes(store_files.versions()))


# The same store for the version with JSON indexes. Arguments: folder, number of records, records a shard.
WRITE_BEFORE = """
import hashlib, json, sys
from pathlib import Path
from vilam3_jax.data import annotations as store
folder, records, in_shard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
place = "f" * 64
answer = {"effusion": 0.25}
template = store.Annotation(place, "CXR", version="1", probabilities=answer).to_bytes()
for number, first in enumerate(range(0, records, in_shard)):
    numbers = range(first, min(records, first + in_shard))
    names = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
    name = f"annotations-0-{number:05d}"
    store._write_shard(folder, name + ".array_record",
                       [template.replace(place.encode(), key.encode()) for key in names])
    entries = [{"input_key": key, "expert": "CXR", "args": "", "record": i, "status": "ok", "version": "1"}
               for i, key in enumerate(names)]
    index = {"schema_version": store.SCHEMA_VERSION, "decoder_version": store.DECODER_VERSION,
             "shard": name + ".array_record", "entries": entries}
    (folder / (name + ".index.json")).write_text(json.dumps(index, indent=1) + "\\n")
"""


def run(code: str, package: Path, *arguments: object) -> str:
    """Runs Python code in a new process that imports the package of a folder; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=package, env=environment, check=True, text=True, stdout=subprocess.PIPE
    )
    return done.stdout


def size(folder: Path, suffix: str) -> float:
    """MiB of the files of a kind."""
    return sum(path.stat().st_size for path in folder.glob(f"*{suffix}")) / (1 << 20)


def row(name: str, measured: dict, index_mib: float, shard_mib: float) -> str:
    """One line of the table."""
    cells = [
        f"{measured['open_s']:8.2f} {measured['open_cpu_s']:8.2f}",
        f"{measured['bytes']['median_us']:8.0f} {measured['bytes']['p99_us']:8.0f}",
        f"{measured['decoded']['median_us']:8.0f} {measured['decoded']['p99_us']:8.0f}",
        f"{measured['missing']['median_us']:8.0f}",
        f"{measured['memory_mib']:8.0f}",
        f"{measured['pickled_bytes'] / 1e6:9.3f}",
        f"{measured['unpickle_s']:8.2f}",
        f"{index_mib:8.0f} {shard_mib:8.0f}",
    ]
    return f"{name:12}" + " ".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write the stores (default: a temporary folder)")
    parser.add_argument("--before", type=Path, help="checkout of a version with JSON indexes")
    options = parser.parse_args(argv)
    here = Path(__file__).resolve().parents[1]
    scratch = Path(tempfile.mkdtemp(prefix="vilam3-store-", dir=options.folder))
    try:
        print("Opening: seconds by the clock, and of CPU. Look-ups: microseconds, median and p99.")
        head = "store             open s, CPU    bytes           decoded      missing   MiB   pickle MB"
        print(head + "  unpickle s  index, shards MiB", flush=True)
        rows = {}
        if options.before is not None:
            folder = scratch / "json"
            folder.mkdir()
            run(WRITE_BEFORE, options.before, folder, options.records, IN_SHARD)
            rows["JSON"] = json.loads(run(MEASURE, options.before, folder, options.records, LOOKUPS))
            print(
                row("JSON", rows["JSON"], size(folder, ".index.json"), size(folder, ".array_record")),
                flush=True,
            )
            shutil.rmtree(folder)
        folder = scratch / "store"
        folder.mkdir()
        start = time.perf_counter()
        write_store(folder, options.records)
        written = time.perf_counter() - start
        rows["written"] = json.loads(run(MEASURE, here, folder, options.records, LOOKUPS))
        print(
            row("as written", rows["written"], size(folder, ".index"), size(folder, ".array_record")),
            flush=True,
        )
        compaction = "import resource, sys, time\nfrom vilam3_jax.data.experts.store import compact\n"
        compaction += "start = time.perf_counter()\ncompact(sys.argv[1])\n"
        compaction += (
            "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        seconds, memory = map(float, run(compaction, here, folder).split())
        rows["compacted"] = json.loads(run(MEASURE, here, folder, options.records, LOOKUPS))
        print(
            row("compacted", rows["compacted"], size(folder, ".index"), size(folder, ".array_record")),
            flush=True,
        )
        print(f"written in {written:.1f} s; compacted in {seconds:.1f} s, peak memory {memory:.0f} MiB")
        if "JSON" in rows:
            old, new = rows["JSON"], rows["compacted"]
            ratios = [f"open {old['open_s'] / new['open_s']:.1f}"]
            ratios += [f"look-up {old['bytes']['median_us'] / new['bytes']['median_us']:.1f}"]
            ratios += [f"memory {old['memory_mib'] / max(new['memory_mib'], 1):.1f}"]
            ratios += [f"pickle {old['pickled_bytes'] / new['pickled_bytes']:.0f}"]
            print(f"before / compacted: {', '.join(ratios)}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
