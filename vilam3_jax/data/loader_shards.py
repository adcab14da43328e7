"""The Grain stages between samples and batches: packing within a shard, and the shards of one worker.

The number of loader shards is a constant of the config. Each has its own order (`ShardOrder`) and packer
(`PackIterator`), so its output does not depend on the worker or host that runs it. `Shards` interleaves
several shards and reads the images of packed samples. Every element carries the state of its shard, which is
a few integers.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from vilam3_jax.data import child_process
from vilam3_jax.data.batch_formats import BatchFormat, Rows
from vilam3_jax.data.batches import Batch
from vilam3_jax.data.loader_records import ShardOrder, Tally
from vilam3_jax.data.packing import Sample
from vilam3_jax.data.sample_reader import SampleReader, Unreadable

_Images = concurrent.futures.Future[Sequence[np.ndarray]]
_Rows = list[list[tuple[Sample, _Images]]]

_READ_AHEAD = 4  # samples rendered ahead, per shard
_UNITS_AHEAD = 2  # the next unit is packed while the images of one are read
_IN_PLACE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_RECENT = 16  # packed samples whose image files a state depends on


@dataclasses.dataclass(frozen=True)
class Place:
    """Progress of a shard."""

    next: int = 0  # index of the next sample to read
    groups: int = 0  # units yielded
    pending: tuple[int, ...] = ()  # indices of the queued samples
    # Index → (number of the dataset, paths of the image files) of the queued samples and the last packed
    # ones, if they have image files.
    files: Mapping[int, tuple[int, tuple[str, ...]]] = dataclasses.field(default_factory=dict)


class Turn(NamedTuple):
    """A unit of the next batch: its shard, and whether this process needs it, or only another one."""

    shard: int
    is_local: bool


@dataclasses.dataclass(frozen=True)
class Turns:
    """Which shard yields which unit of a batch.

    A batch has gcd(shards, units) streams: runs of consecutive units, each with its own shards, which take
    turns. So a process runs only the shards of its part of the batch.
    """

    units: int  # number of units in the global batch
    shards: int  # S
    local_units: tuple[int, ...]  # numbers of the units that this process yields, in ascending order

    @property
    def streams(self) -> int:
        return math.gcd(self.shards, self.units)

    @property
    def own_streams(self) -> list[int]:
        """The streams that this process runs, in ascending order."""
        return sorted({unit * self.streams // self.units for unit in self.local_units})

    @property
    def own_shards(self) -> list[int]:
        """The shards that this process runs, in ascending order."""
        own = set(self.own_streams)
        return [number for number in range(self.shards) if number % self.streams in own]

    def batch(self, groups: Mapping[int, int]) -> list[Turn]:
        """The units of the next batch in order; `groups` has the units that each own shard yielded so far."""
        each, local = self.units // self.streams, set(self.local_units)
        turns = []
        for number in self.own_streams:
            ring = range(number, self.shards, self.streams)
            first = sum(groups[shard] for shard in ring)  # the shards' counters determine whose turn it is
            turns += [
                Turn(ring[(first + turn) % len(ring)], number * each + turn in local) for turn in range(each)
            ]
        return turns


class PackIterator(Iterator[Rows]):
    """Packs the samples of one shard into units."""

    def __init__(self, order: ShardOrder, batch_format: BatchFormat, tally: Tally, start: Place) -> None:
        """Continues from `start`; raises `UserError` if a sample queued there can no longer be read."""
        samples = order.slice(slice(start.next, None)).to_iter_dataset(_IN_PLACE)
        ahead = grain.experimental.ThreadPrefetchIterDataset(samples, prefetch_buffer_size=_READ_AHEAD)
        self._samples = iter(ahead)
        self._format, self._tally = batch_format, tally
        self._next, self._groups = start.next, start.groups
        self._pending = [order.records.load_again(order.position(index), index) for index in start.pending]
        self._files = dict(start.files)

    @property
    def place(self) -> Place:
        pending = tuple(sample.index for sample in self._pending)
        return Place(self._next, self._groups, pending, dict(self._files))

    def __next__(self) -> Rows:
        rows, self._pending = self._format.next_unit(self._pending, self._pull)
        placed = [sample for row in rows for sample in row]
        if not placed:
            raise StopIteration
        self._groups += 1
        queued = {sample.index for sample in self._pending}
        recent = {index: found for index, found in self._files.items() if index not in queued}
        recent |= _files(placed)
        self._files = dict(list(recent.items())[-_RECENT:]) | _files(self._pending)
        return rows

    def _pull(self) -> Sample | None:
        while (found := next(self._samples, None)) is not None:
            self._next += 1
            if isinstance(found, Sample):
                self._tally.good(found.source)
                return found
            self._tally.bad(found)
        return None

    def close(self) -> None:
        """Stops the thread that reads ahead."""
        self._samples.close()


def _files(samples: Sequence[Sample]) -> dict[int, tuple[int, tuple[str, ...]]]:
    return {s.index: (s.source, s.image_paths) for s in samples if s.image_paths}


@dataclasses.dataclass(frozen=True)
class UnitInfo:
    """Metadata of an element."""

    shard: int  # that yielded the unit
    place: Place  # progress of the shard after it
    skipped: tuple[tuple[str, str], ...]  # (name, reason) of the records skipped before it
    missing: tuple[str, ...] = ()  # names of the experts whose annotations its samples lack


class Shards(grain.IterDataset[dict[str, Any]]):
    """Units of some shards in the order of batches; endless.

    An element is a dict of `info` and `unit`, a batch of one unit. It is None if another process needs it or
    the shard is exhausted.
    """

    def __init__(
        self,
        records: SampleReader,
        batch_format: BatchFormat,
        *,
        turns: Turns,
        own: Sequence[int],
        starts: Mapping[int, Place],
        threads: int,
    ) -> None:
        """Stores the arguments, which are pickled for worker processes.

        Args:
          records, batch_format: those of the run.
          turns: turns of the whole process.
          own: the shards to run, some of `turns.own_shards`.
          starts: shard of the process → where it continues.
          threads: number of threads that read images.
        """
        super().__init__()
        self.records, self.batch_format, self.turns, self.threads = records, batch_format, turns, threads
        self.own, self.starts = tuple(own), dict(starts)

    def __iter__(self) -> ShardsIterator:
        return ShardsIterator(self)

    def __str__(self) -> str:
        return f"Shards(own={self.own})"


class ShardsIterator(grain.DatasetIterator[dict[str, Any]]):
    """See `Shards`."""

    def __init__(self, dataset: Shards) -> None:
        super().__init__()
        self._records, self._format, self._turns = dataset.records, dataset.batch_format, dataset.turns
        self._own, self._starts = frozenset(dataset.own), dataset.starts
        sources = dataset.records.samples.sources
        self._texts, self._images = Tally(sources), Tally(sources)
        self._packers: dict[int, PackIterator] | None = None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._threads = dataset.threads
        self._order = self._endless_turns()
        self._units: collections.deque[tuple[UnitInfo, _Rows | None]] = collections.deque()

    def _endless_turns(self) -> Iterator[Turn]:
        groups = {number: self._starts[number].groups for number in self._turns.own_shards}
        while True:
            for turn in self._turns.batch(groups):
                groups[turn.shard] += 1
                if turn.shard in self._own:
                    yield turn

    def __next__(self) -> dict[str, Any]:
        self._assert_not_closed()
        if self._packers is None:
            self._open()
        while len(self._units) < _UNITS_AHEAD:
            self._units.append(self._packed(next(self._order)))
        return self._element(*self._units.popleft())

    def _open(self) -> None:
        child_process.end_with_parent()
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix="vilam3-decode")
        self._packers = {}
        for number in self._own:
            order = ShardOrder(self._records, number, self._turns.shards)
            self._packers[number] = PackIterator(order, self._format, self._texts, self._starts[number])
        # Worker processes exit without closing their iterator.
        self._closing = weakref.finalize(self, _close, tuple(self._packers.values()), self._pool)

    def _packed(self, turn: Turn) -> tuple[UnitInfo, _Rows | None]:
        """The next unit of a shard, whose images are being read."""
        assert self._packers is not None and self._pool is not None  # `_open` was called
        packer = self._packers[turn.shard]
        rows = next(packer, None)
        placed = None
        if rows is not None and turn.is_local:
            placed = [[(sample, self._pool.submit(sample.read_images)) for sample in row] for row in rows]
        return UnitInfo(turn.shard, packer.place, self._texts.take()), placed

    def _element(self, info: UnitInfo, rows: _Rows | None) -> dict[str, Any]:
        batch = None if rows is None else self._batch(rows)
        skipped = (*info.skipped, *self._images.take())
        missing = tuple(name for row in rows or () for sample, _ in row for name in sample.missing)
        return {"info": dataclasses.replace(info, skipped=skipped, missing=missing), "unit": batch}

    def _batch(self, rows: _Rows) -> Batch:
        """The unit; samples with unreadable images are left out, and their positions stay empty."""
        readable: list[list[Sample]] = []
        for row in rows:
            readable.append([])
            for sample, images in row:
                try:
                    images.result()
                except Unreadable as error:
                    self._images.bad(error.bad)
                    continue
                if sample.num_images:
                    self._images.good(sample.source)
                readable[-1].append(dataclasses.replace(sample, read_images=images.result))
        return self._format.assemble(readable)

    def close(self) -> None:
        super().close()
        if self._packers is not None:
            self._closing()

    def get_state(self) -> dict[str, Any]:
        return {}  # the state travels with the elements

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("shards start at their `Place`s")


def _close(packers: Sequence[PackIterator], pool: concurrent.futures.Executor) -> None:
    for packer in packers:
        packer.close()
    pool.shutdown(wait=True, cancel_futures=True)
