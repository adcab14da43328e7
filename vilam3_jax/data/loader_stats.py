"""What a loader returned so far, and what it skipped."""

from __future__ import annotations

import collections
import dataclasses

from vilam3_jax.data.batches import Batch, PackedBatch


@dataclasses.dataclass
class Stats:
    """What was returned so far, and what was skipped.

    Attributes:
      batches, samples, tokens, images: counts of what was returned.
      positions, slots: token positions and image slots of the batches, filled or not.
      skipped: (id, reason) of the records skipped, each once, the first hundred thousand.
      skipped_total: how often a record was skipped.
      missing: expert → requests that were shown without its result, as there is no annotation.
    """

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    positions: int = 0
    slots: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    skipped_total: int = 0
    missing: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    _named: set[str] = dataclasses.field(default_factory=set, repr=False)

    @property
    def token_fill(self) -> float:
        """Share of the token positions that hold a token."""
        return self.tokens / max(self.positions, 1)

    @property
    def image_fill(self) -> float:
        """Share of the image slots that hold an image."""
        return self.images / max(self.slots, 1)

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
        self.positions += mask.size
        self.slots += valid.size

    def skip(self, name: str, reason: str) -> None:
        """Counts a record that was skipped; names it once."""
        self.skipped_total += 1
        if name not in self._named and len(self._named) < _MAX_NAMED:
            self._named.add(name)
            self.skipped.append((name, reason))


_MAX_NAMED = 100_000
