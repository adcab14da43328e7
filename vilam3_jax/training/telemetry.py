"""What a run says of itself: one JSON line per logged step, and a progress bar."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from vilam3_jax import paths

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `<workdir>/metrics.jsonl`; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, workdir: paths.PathLike, start_step: int) -> None:
        self._path = paths.as_path(workdir) / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step] if start_step else []
        paths.write_text_atomic(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; `step` counts finished optimizer steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NoWriter:
    """Stands in for `MetricsWriter` in all processes but one."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Nothing is open."""


def read_metrics(workdir: paths.PathLike) -> list[dict[str, Any]]:
    """Reads the lines written so far; a torn last line (the process was killed) is dropped."""
    path = paths.as_path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def progress_bar(name: str, total: int, done: int, shown: bool = True) -> tqdm:
    """A bar that tells stage, step, speed and time left; the loop adds the loss."""
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit="step",
        disable=not shown,
        dynamic_ncols=True,
        smoothing=0.1,
        mininterval=1.0,
    )


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, in bytes (Linux reports kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
