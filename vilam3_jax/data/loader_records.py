"""Records of a run by position: samples, and what cannot be one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import grain
import numpy as np

from vilam3_jax.data import packing, stream
from vilam3_jax.data.packing import GroupShape, Sample
from vilam3_jax.errors import StoppingError, UnavailableError, UserError

_ENDLESS = 1 << 60  # length of a shard of the endless order
# A record that fails otherwise is skipped; with too little memory, or without the disk, all would be.
_ENDING = (UnavailableError, StoppingError, MemoryError)


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that is skipped.

    Attributes:
      name: of the record, for people.
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
      samples: the order of records.
      read: makes the sample of (address, position); `SampleReader.sample`.
      shape: sizes of a group, which a sample must fit.
    """

    samples: stream.SampleStream
    read: Callable[[tuple[int, int], int], Sample]
    shape: GroupShape

    def load(self, position: int, index: int) -> Sample | BadRecord:
        """The sample at a position of the stream, see `sample`."""
        return self.sample(self.samples.address(position), position, index)

    def sample(self, address: tuple[int, int], position: int, index: int) -> Sample | BadRecord:
        """Renders and encodes a sample; what is wrong with a record is returned, not raised.

        Args:
          address: (number of the dataset, record in it).
          position: in the order of samples.
          index: of the sample in its loader shard.

        Raises:
          UnavailableError: the data cannot be read now.
          StoppingError: the settings do not allow the record to be skipped.
        """
        name, source = self.samples.name(address), address[0]
        try:
            sample = self.read(address, position)
        except _ENDING:
            raise
        except Exception as error:  # whatever is wrong in a record, the run goes on
            return BadRecord(name, _reason(error), source)
        if reason := packing.oversize_reason(self.shape, sample):
            return BadRecord(f"{name} ({sample.id})", reason, source)
        read_images = functools.partial(_images, name, source, sample.read_images)
        return dataclasses.replace(sample, index=index, source=source, read_images=read_images)


def _images(name: str, source: int, read: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
    try:
        return read()
    except _ENDING:
        raise
    except Exception as error:
        raise Unreadable(BadRecord(name, _reason(error), source)) from error


def _reason(error: Exception) -> str:
    """What people are told; the text of errors that are not ours may quote values of the record."""
    if isinstance(error, UserError):
        return str(error)
    return f"a value in it is none that the program can use ({type(error).__name__})"


class ShardOrder(grain.MapDataset[Sample | BadRecord]):
    """The samples of one loader shard by index; bad records have their place, too."""

    def __init__(self, records: RecordLoader, shard: int, shards: int) -> None:
        """Reads nothing.

        Args:
          records: of the run.
          shard: number of the loader shard.
          shards: S, how many there are.
        """
        super().__init__()
        self._records, self._shard, self._shards = records, shard, shards

    def __len__(self) -> int:
        length = self._records.samples.length
        if length is None:
            return _ENDLESS
        whole = length // self._shards
        return whole + (stream.dealt_position(whole, self._shard, self._shards) < length)

    def __getitem__(self, index):
        return self.slice(index) if isinstance(index, slice) else self.load(index)

    def load(self, index: int) -> Sample | BadRecord:
        """The sample `index` of the shard, see `RecordLoader.load`."""
        return self._records.load(stream.dealt_position(index, self._shard, self._shards), index)

    def __str__(self) -> str:
        return f"ShardOrder(shard={self._shard}, shards={self._shards})"
