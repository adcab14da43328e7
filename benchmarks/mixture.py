"""What the order of a mixture costs, and how evenly it is spread: VILA-M3's published table and a huge one.

    python benchmarks/mixture.py

No dataset is read: records are numbers. Prints the time to the first position, to a far one and for each
position in order, and the largest deviation of a dataset from its share over all prefixes and all windows.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from vilam3_jax.data.stream import SampleStream

# Records of each dataset and its epochs in a pass.
STAGE4 = (
    (10_178, 10), (25_124, 4), (23_888, 4), (26_034, 4), (129_232, 2), (270_000, 1), (270_000, 1),
    (50_000, 8), (15_000, 16),
)  # fmt: skip
HUGE = ((2_000_000_000, 1), (25_000_000, 0.5), (10_000, 3))
_POSITIONS = 100_000


class _Numbers:
    """As much of a dataset as an order needs."""

    split = "train"

    def __init__(self, name: str, size: int) -> None:
        self.name, self._size = name, size

    def __len__(self) -> int:
        return self._size

    def digests(self) -> list[str]:
        return []


def _stream(table: Any) -> SampleStream:
    sources: Any = [(_Numbers(f"set{number}", size), weight) for number, (size, weight) in enumerate(table)]
    return SampleStream(sources, 0, endless=True)


def _timed(stream: SampleStream, position: int) -> float:
    begun = time.perf_counter()
    stream.address(position)
    return time.perf_counter() - begun


def measure(name: str, table: Any) -> None:
    """Prints the line of one mixture."""
    begun = time.perf_counter()
    stream = _stream(table)
    opened = time.perf_counter() - begun
    length = int(stream.pass_length)
    first, far = _timed(stream, 0), _timed(stream, length - 1)
    begun = time.process_time()
    for position in range(_POSITIONS):
        stream.address(position)
    each = (time.process_time() - begun) / _POSITIONS
    print(
        f"{name}: {stream.records:,} records, {length:,} samples a pass; opened in {opened * 1e3:.1f} ms, "
        f"first position {first * 1e3:.1f} ms, last of the pass {far * 1e3:.1f} ms, "
        f"{each * 1e6:.0f} us a position"
    )


def deviations(table: Any) -> None:
    """Prints how far datasets get from their shares over a whole period."""
    order = _stream(table)._mixed
    chosen = np.array([order[position][0] for position in range(order.period)])
    prefix = window = 0.0
    for dataset, rate in enumerate(order.rates):
        counts = np.concatenate([[0], np.cumsum(chosen == dataset)])
        off = counts - np.arange(len(counts)) * (rate / order.period)
        prefix, window = max(prefix, np.abs(off).max()), max(window, off.max() - off.min())
    print(f"largest deviation from a share: {prefix:.3f} over prefixes, {window:.3f} over windows")


if __name__ == "__main__":
    measure("stage 4", STAGE4)
    deviations(STAGE4)
    measure("huge", HUGE)
