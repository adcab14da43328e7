"""Bad records: counted, named and, where there is nothing else, the end of the run."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from vilam3_jax.data.loader_records import BadRecord
from vilam3_jax.data.stream import Source
from vilam3_jax.errors import UserError

# Bad records of one dataset in a row before giving up: all of a small one, enough to know of a large one.
_BAD_IN_A_ROW = (16, 1000)


class Tally:
    """Bad records since they were last taken, and how many of a dataset came in a row."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Starts at zero.

        Args:
          sources: the datasets of the run.
        """
        self._sources = sources
        self._in_a_row: collections.Counter[int] = collections.Counter()
        self._skipped: list[tuple[str, str]] = []

    def good(self, source: int) -> None:
        """Notes that a record of a dataset could be used."""
        self._in_a_row[source] = 0

    def bad(self, record: BadRecord) -> None:
        """Notes a record that is skipped.

        Raises:
          UserError: the dataset seems to have no good record.
        """
        self._skipped.append((record.name, record.reason))
        self._in_a_row[record.source] += 1
        tried, source = self._in_a_row[record.source], self._sources[record.source]
        least, most = _BAD_IN_A_ROW
        if tried >= max(least, min(len(source), most)):
            raise UserError(
                f"no usable record of {source.name} in {tried} tried; "
                f"the last: {record.name}: {record.reason}"
            )

    def take(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the bad records since the last call."""
        taken, self._skipped = tuple(self._skipped), []
        return taken
