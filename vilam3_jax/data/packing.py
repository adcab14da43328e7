"""Packing of samples into groups of fixed shape, tokens and images together.

A group is R rows of L tokens that share M image slots, all on one device. The groups depend only on the order
and the sizes of samples, so a few integers suffice to resume exactly. Sizes are known before images are read,
so queued samples need no memory for pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.templates import Encoded

NO_GRID = (1, 0, 1, 0)  # rows, row, columns, column of an input outside a grid
LOOKAHEAD = 64  # samples to choose a row from; measured by `benchmarks/packing.py`
_SLOT_IN_TOKENS = 16  # penalty, in empty tokens, per image above or below a row's share of the slots


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """Sizes of a group."""

    rows: int  # R, rows of a group
    seq_len: int  # L, tokens of a row
    images: int  # M, image slots of a group
    tokens_per_image: int  # T, positions of an image
    image_size: int  # side of an image in pixels
    pad_id: int = 0  # token id of empty positions
    tiled: bool = False  # whether samples have a tile map


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A sample to pack."""

    id: str  # id of the example
    index: int  # index in the order of the loader shard
    encoded: Encoded
    # Reads `num_images` inputs of the vision tower, uint8 [S, S, 3], in the order of their markers; called
    # once, when the sample is packed.
    read_images: Callable[[], Sequence[np.ndarray]] = tuple
    tile_map: np.ndarray | None = None  # int32 [inputs, 5], see `ImageProcessor.tile_map`; None if not merged
    source: int = 0  # number of the dataset
    image_paths: tuple[str, ...] = ()  # paths of image files, relative to the data root of the dataset
    experts: tuple[str, ...] = ()  # names of the experts whose results it shows
    missing: tuple[str, ...] = ()  # names of the experts without an annotation

    @property
    def num_tokens(self) -> int:
        """Its positions in a row."""
        return len(self.encoded)

    @property
    def num_images(self) -> int:
        """Its image slots in a group."""
        return self.encoded.num_images


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a sample, which is all that packing depends on."""

    num_tokens: int
    num_images: int


AnySized = TypeVar("AnySized", bound=Sample | Size)


def oversize_reason(shape: GroupShape, sample: Sample) -> str | None:
    """Why a sample cannot be packed at all, or None."""
    if sample.num_tokens > shape.seq_len:
        return f"{sample.num_tokens} tokens, a row has {shape.seq_len}; raise data.seq_len"
    if sample.num_images > shape.images:
        return f"{sample.num_images} images, a group has {shape.images}; raise data.images_per_group"
    return None


def next_group(
    shape: GroupShape,
    pending: Sequence[AnySized],
    pull: Callable[[], AnySized | None],
    lookahead: int = LOOKAHEAD,
) -> tuple[list[list[AnySized]], list[AnySized]]:
    """Fills one group, row by row.

    A row takes the oldest queued sample, then the set that best fills the remaining tokens and uses the row's
    share of the remaining image slots; ties go to the set with the oldest samples. Every group takes the
    oldest sample, so a sample waits for at most as many groups as there are samples before it in the queue.

    Args:
      shape: sizes; no sample may be oversized.
      pending: samples left from the previous group, in order of arrival.
      pull: returns the next sample of the stream; None at its end.
      lookahead: minimum length of the queue before a row is filled; longer if it is too short for two rows.

    Returns:
      (samples of each row, queue for the next group). All rows are empty only at the end of the stream.
    """
    waiting = list(pending)
    tokens = sum(sample.num_tokens for sample in waiting)
    rows: list[list[AnySized]] = []
    slots = shape.images
    for rows_left in range(shape.rows, 0, -1):
        while len(waiting) < lookahead or tokens < 2 * shape.seq_len:
            sample = pull()
            if sample is None:
                break
            waiting.append(sample)
            tokens += sample.num_tokens
        chosen = _choose_row(waiting, shape.seq_len, slots, slots / rows_left)
        rows.append([waiting[place] for place in chosen])
        tokens -= sum(sample.num_tokens for sample in rows[-1])
        slots -= sum(sample.num_images for sample in rows[-1])
        taken = set(chosen)
        waiting = [sample for place, sample in enumerate(waiting) if place not in taken]
    return rows, waiting


def _choose_row(waiting: Sequence[Sample | Size], length: int, slots: int, share: float) -> list[int]:
    """Returns the ascending indices in `waiting` of the samples of one row.

    Solves subset-sum with bitsets: bit t of `table[i]` is set if some subset has i images and t tokens.
    Tables are built from the youngest sample to the oldest, and traced back from the oldest.
    """
    first = next((place for place, s in enumerate(waiting) if s.num_images <= slots), None)
    if first is None:
        return []
    room = length - waiting[first].num_tokens
    most = max(min(slots, -int(-share // 1)) - waiting[first].num_images, 0)
    wanted = share - waiting[first].num_images
    others = [
        (place, s.num_tokens, s.num_images)
        for place, s in enumerate(waiting)
        if place != first and s.num_tokens <= room and s.num_images <= most
    ]
    bits = (1 << (room + 1)) - 1
    tables = [[1] + [0] * most]
    for _, tokens, images in reversed(others):
        before = tables[-1]
        moved = [0] * images + [(sums << tokens) & bits for sums in before[: most + 1 - images]]
        tables.append([old | new for old, new in zip(before, moved, strict=True)])
    reached = {images: sums.bit_length() - 1 for images, sums in enumerate(tables[-1]) if sums}
    images, tokens = min(
        reached.items(), key=lambda sums: room - sums[1] + _SLOT_IN_TOKENS * abs(sums[0] - wanted)
    )
    chosen = [first]
    for (place, its_tokens, its_images), rest in zip(others, reversed(tables[:-1]), strict=True):
        fits = its_tokens <= tokens and its_images <= images
        if fits and rest[images - its_images] >> (tokens - its_tokens) & 1:
            chosen.append(place)
            tokens, images = tokens - its_tokens, images - its_images
    return sorted(chosen)


def assemble_group(shape: GroupShape, rows: Sequence[Sequence[Sample]]) -> PackedBatch:
    """Reads the images of a group; returns a batch of rows [R, L] with G = 1."""
    flat = (shape.rows, shape.seq_len)
    group = PackedBatch(
        tokens=np.full(flat, shape.pad_id, np.int32),
        segment_ids=np.zeros(flat, np.int32),
        positions=np.zeros(flat, np.int32),
        loss_weights=np.zeros(flat, np.float32),
        visual_index=np.full(flat, -1, np.int32),
        images=np.zeros((1, shape.images, shape.image_size, shape.image_size, 3), np.uint8),
        image_valid=np.zeros((1, shape.images), bool),
        image_tiles=np.tile(np.asarray((0, *NO_GRID), np.int32), (1, shape.images, 1))
        if shape.tiled
        else None,
    )
    slot = 0
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, start=1):
            encoded = sample.encoded
            where = (row, slice(start, start + len(encoded)))
            group.tokens[where] = encoded.tokens
            group.segment_ids[where] = segment
            group.positions[where] = np.arange(len(encoded))
            group.loss_weights[where] = encoded.loss_mask
            group.loss_weights[row, start] = 0.0
            index = (slot + encoded.image_of_token) * shape.tokens_per_image + encoded.visual_offset
            group.visual_index[where] = np.where(encoded.image_of_token >= 0, index, -1)
            slots = slice(slot, slot + sample.num_images)
            if sample.tile_map is not None:
                group.image_tiles[0, slots] = sample.tile_map
                group.image_tiles[0, slots, 0] += slot
            for place, image in zip(range(slots.start, slots.stop), sample.read_images(), strict=True):
                group.images[0, place] = image
            group.image_valid[0, slots] = True
            slot += sample.num_images
            start += len(encoded)
    return group
