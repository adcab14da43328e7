"""The order of samples in a loader shard, and counts of samples and bad records."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import grain

from vilam3_jax.data import stream
from vilam3_jax.data.batches import Batch, PackedBatch
from vilam3_jax.data.packing import Sample
from vilam3_jax.data.sample_reader import BadRecord, SampleReader
from vilam3_jax.errors import UserError

_MAX_NAMED = 100_000
_ENDLESS = 1 << 60  # length of a shard of the endless order
# A dataset is given up after as many bad records in a row as it has, but at least and at most these.
_MAX_BAD_IN_A_ROW = (16, 1000)


class ShardOrder(grain.MapDataset[Sample | BadRecord]):
    """The samples and bad records of one loader shard by index."""

    def __init__(self, records: SampleReader, shard: int, shards: int) -> None:
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
        """The sample at an index of the shard; see `SampleReader.load`."""
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
        """Counts a record that is skipped; raises `UserError` for too many of a dataset in a row."""
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
    """Counts of what was yielded and skipped."""

    batches: int = 0  # number of batches yielded, as samples, tokens and images
    samples: int = 0
    tokens: int = 0
    images: int = 0
    # (name, reason) of the skipped records, each once, the first 100,000.
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    skipped_total: int = 0  # number of skips, repeated ones included
    # Expert → requests without an annotation.
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
