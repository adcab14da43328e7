"""Samples of a run by position, bad records, and counts of both."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import grain
import numpy as np

from vilam3_jax.data import packing, stream
from vilam3_jax.data.batches import Batch, PackedBatch
from vilam3_jax.data.packing import GroupShape, Sample
from vilam3_jax.errors import StoppingError, UnavailableError, UserError

_MAX_NAMED = 100_000
_ENDLESS = 1 << 60  # length of a shard of the endless order
# Errors that concern all records, so no record is skipped for them.
_FATAL = (UnavailableError, StoppingError, MemoryError)
# A dataset is given up after as many bad records in a row as it has, but at least and at most these.
_MAX_BAD_IN_A_ROW = (16, 1000)


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that is skipped.

    Attributes:
      name: of the record, for messages.
      reason: why, in one sentence.
      source: number of its dataset.
    """

    name: str
    reason: str
    source: int


class Unreadable(Exception):
    """The images of a sample cannot be read."""

    def __init__(self, bad: BadRecord) -> None:
        super().__init__(f"{bad.name}: {bad.reason}")
        self.bad = bad


@dataclasses.dataclass(frozen=True, eq=False)
class RecordLoader:
    """Turns positions into samples.

    Attributes:
      samples: the order of samples.
      read: (address, position) → sample; `SampleReader.sample`.
      shape: sizes of a group, which a sample must fit.
    """

    samples: stream.SampleStream
    read: Callable[[tuple[int, int], int], Sample]
    shape: GroupShape

    def load(self, position: int, index: int) -> Sample | BadRecord:
        """The sample at a position of the stream; see `sample`."""
        return self.sample(self.samples.address(position), position, index)

    def load_again(self, position: int, index: int) -> Sample:
        """A sample that was readable before a restart; raises UserError if it no longer is."""
        sample = self.load(position, index)
        if isinstance(sample, BadRecord):
            raise UserError(
                f"{sample.name}: was readable before the restart, but now: {sample.reason}; restore the data"
            )
        return sample

    def sample(self, address: tuple[int, int], position: int, index: int) -> Sample | BadRecord:
        """Renders and encodes a sample; errors of the record are returned as a `BadRecord`.

        Args:
          address: (number of the dataset, record in it).
          position: in the order of samples.
          index: index of the sample in its loader shard.

        Raises:
          UnavailableError: the data cannot be read now.
          StoppingError: the settings do not allow skipping the record.
        """
        name, source = self.samples.name(address), address[0]
        try:
            sample = self.read(address, position)
        except _FATAL:
            raise
        except Exception as error:  # the run continues, whatever is wrong with a record
            return BadRecord(name, _reason(error), source)
        if reason := packing.oversize_reason(self.shape, sample):
            return BadRecord(f"{name} ({sample.id})", reason, source)
        read_images = functools.partial(_images, name, source, sample.read_images)
        return dataclasses.replace(sample, index=index, source=source, read_images=read_images)


def _images(name: str, source: int, read: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
    try:
        return read()
    except _FATAL:
        raise
    except Exception as error:
        raise Unreadable(BadRecord(name, _reason(error), source)) from error


def _reason(error: Exception) -> str:
    # Other errors may quote values of the record, such as patient data.
    if isinstance(error, UserError):
        return str(error)
    return f"a value in it cannot be used ({type(error).__name__})"


class ShardOrder(grain.MapDataset[Sample | BadRecord]):
    """The samples and bad records of one loader shard by index."""

    def __init__(self, records: RecordLoader, shard: int, shards: int) -> None:
        super().__init__()
        self.records, self._shard, self._shards = records, shard, shards

    def __len__(self) -> int:
        length = self.records.samples.length
        if length is None:
            return _ENDLESS
        whole = length // self._shards
        return whole + (stream.dealt_position(whole, self._shard, self._shards) < length)

    def __getitem__(self, index):
        return self.slice(index) if isinstance(index, slice) else self.load(index)

    def load(self, index: int) -> Sample | BadRecord:
        """The sample at an index of the shard; see `RecordLoader.load`."""
        return self.records.load(self.position(index), index)

    def position(self, index: int) -> int:
        """The position in the stream."""
        return stream.dealt_position(index, self._shard, self._shards)

    def __str__(self) -> str:
        return f"ShardOrder(shard={self._shard}, shards={self._shards})"


class Tally:
    """Bad records since the last `take`, and how many of a dataset came in a row."""

    def __init__(self, sources: Sequence[stream.Source]) -> None:
        self._sources = sources
        self._in_a_row: collections.Counter[int] = collections.Counter()
        self._skipped: list[tuple[str, str]] = []

    def good(self, source: int) -> None:
        """Counts a usable record of a dataset."""
        self._in_a_row[source] = 0

    def bad(self, record: BadRecord) -> None:
        """Counts a record that is skipped.

        Raises:
          UserError: too many bad records in a row; the dataset seems to have no good one.
        """
        self._skipped.append((record.name, record.reason))
        self._in_a_row[record.source] += 1
        tried, source = self._in_a_row[record.source], self._sources[record.source]
        low, high = _MAX_BAD_IN_A_ROW
        if tried >= max(low, min(len(source), high)):
            raise UserError(
                f"no usable record of {source.name} in {tried} tried; "
                f"the last: {record.name}: {record.reason}"
            )

    def take(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the bad records since the last call."""
        taken, self._skipped = tuple(self._skipped), []
        return taken


@dataclasses.dataclass
class Stats:
    """Counts of what was yielded and skipped.

    Attributes:
      batches, samples, tokens, images: yielded.
      skipped: (name, reason) of the skipped records, each once, the first 100,000.
      skipped_total: number of skips, repeated ones included.
      missing: expert → requests without an annotation.
    """

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    skipped_total: int = 0
    missing: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    _named: set[str] = dataclasses.field(default_factory=set, repr=False)

    def add(self, batch: Batch) -> None:
        """Counts a batch."""
        self.batches += 1
        if isinstance(batch, PackedBatch):
            self.samples += int(batch.segment_ids.max(axis=1).sum())
            mask, valid = batch.segment_ids > 0, batch.image_valid
        else:
            mask, valid = batch.text_valid, batch.text_valid.any(axis=1)
            self.samples += int(valid.sum())
        self.tokens += int(mask.sum())
        self.images += int(valid.sum())

    def skip(self, name: str, reason: str) -> None:
        """Counts a skipped record."""
        self.skipped_total += 1
        if name not in self._named and len(self._named) < _MAX_NAMED:
            self._named.add(name)
            self.skipped.append((name, reason))
