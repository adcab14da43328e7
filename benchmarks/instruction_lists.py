"""How fast a large list of dialogues is walked through, and in how much memory.

    python benchmarks/instruction_lists.py --folder DIR --megabytes 1000

Writes a JSON list of made-up dialogues of two turns, a kilobyte each, two records to an image, and scans it
as `vilam3 prepare instructions` does: places, ids, copies, and what shares an image.
"""

from __future__ import annotations

import argparse
import functools
import json
import pickle
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vilam3_jax.datasets import instruction_lists, instructions, user_data

_WORDS = "a made-up finding of the upper field, [not] seen {before}; "


def write_list(path: Path, megabytes: int) -> int:
    """Writes about `megabytes` of records; returns how many."""
    count = 0
    with path.open("w") as file:
        file.write("[")
        while file.tell() < megabytes * 10**6:
            for _ in range(1000):
                turns = [
                    {"from": "human", "value": f'<image>\nWhat is "{count}"? {_WORDS * 4}'},
                    {"from": "gpt", "value": _WORDS * 10},
                ]
                record = {"id": f"{count:09d}", "image": f"set/{count // 2:012d}.jpg", "conversations": turns}
                file.write((",\n" if count else "") + json.dumps(record))
                count += 1
        file.write("]")
    return count


def main(argv: Sequence[str]) -> int:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description="Scan a large list of dialogues.")
    parser.add_argument("--folder", required=True, help="where the list is written; it is removed afterwards")
    parser.add_argument("--megabytes", type=int, default=1000)
    options = parser.parse_args(argv)
    path = Path(options.folder) / "list.json"
    count = write_list(path, options.megabytes)
    try:
        before, start = _peak_mb(), time.process_time()
        shared = functools.partial(instructions.ties, patient=None)
        found = instruction_lists.scan(str(path), shared)
        groups = user_data.groups_of(len(found.records), found.nodes, found.records["start"])
        seconds = time.process_time() - start
        row = {
            "records": count,
            "megabytes": round(path.stat().st_size / 1e6),
            "processor_seconds": round(seconds, 1),
            "megabytes_per_second": round(path.stat().st_size / 1e6 / seconds, 1),
            "peak_mb_above_start": round(_peak_mb() - before),
            "groups": len(set(groups.tolist())),
            "bytes_of_items_per_record": round(
                len(pickle.dumps(instruction_lists.RecordList(found.records))) / count, 1
            ),
        }
        print(json.dumps(row))
    finally:
        path.unlink()
    return 0


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
