"""Packing: samples of different lengths into groups of fixed shape, tokens and images together.

A group is R rows of L tokens that share M image slots; it lives on one device. Which samples share a group
depends on their order and sizes alone, never on threads or clocks, so a few integers resume exactly. Sizes
are known before images are read: many samples may wait for a place without a pixel in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.templates import Encoded

NO_GRID = (1, 0, 1, 0)  # rows, row, columns, column of an input that is no tile of a grid
LOOKAHEAD = 64  # samples to choose a row from; `benchmarks/packing.py` shows what fewer and more give
_SLOT_IN_TOKENS = 16  # empty tokens that a row accepts to be one image nearer to its share of the slots


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """Sizes of a group.

    Attributes:
      rows: R, rows of a group.
      seq_len: L, tokens of a row.
      images: M, image slots of a group.
      tokens_per_image: T, positions an image takes.
      image_size: side of an image in pixels.
      pad_id: token id of empty positions.
      tiled: whether samples have a tile map.
    """

    rows: int
    seq_len: int
    images: int
    tokens_per_image: int
    image_size: int
    pad_id: int = 0
    tiled: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A sample ready to be packed.

    Attributes:
      id: the example's id.
      index: its position in the loader shard's order.
      source: number of its dataset.
      encoded: its tokens.
      read_images: gives its inputs of the vision tower in the order of their markers, `num_images` times
        uint8 [S, S, 3]; called once, when it has a place.
      tile_map: int32 [inputs, 5], see `ImageProcessor.tile_map`; None where tiles stay apart.
      picture_paths: of its images that are files, below the dataset's data root.
      experts: names of the experts that speak in it.
      missing: names of those that do not, for want of an annotation.
    """

    id: str
    index: int
    encoded: Encoded
    read_images: Callable[[], Sequence[np.ndarray]] = tuple
    tile_map: np.ndarray | None = None
    source: int = 0
    picture_paths: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions it takes in a row."""
        return len(self.encoded)

    @property
    def num_images(self) -> int:
        """Image slots it takes in a group."""
        return self.encoded.num_images


class Sized(Protocol):
    """What packing looks at."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_images(self) -> int: ...


AnySized = TypeVar("AnySized", bound=Sized)


def oversize_reason(shape: GroupShape, sample: Sized) -> str | None:
    """Returns why a sample can never be packed, or None."""
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

    A row takes the oldest sample that waits and for the rest of its tokens the set that fills it best, with
    as near as possible its share of the image slots that are left; of sets that do equally well, the one with
    the oldest samples. The oldest of all always gets a place, so a sample waits for at most as many groups as
    samples waited before it.

    Args:
      shape: sizes; no sample may be oversized.
      pending: samples left over from the group before, in order of arrival.
      pull: gives the next sample of the stream, None at its end.
      lookahead: samples that are drawn before a row is filled; more where they are too short for two rows.

    Returns:
      (samples of each row, samples that wait for the next group). All rows are empty only at the end.
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


def _choose_row(waiting: Sequence[Sized], length: int, slots: int, share: float) -> list[int]:
    """The places in `waiting` of one row's samples, rising.

    Which (tokens, images) sums can be reached is a table: an integer for each number of images, whose bit t
    says that some set has t tokens. Built from the youngest to the oldest and read back from the oldest.
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
    """Reads the images of a group's samples and writes its arrays.

    Returns:
      A batch of this one group: `[R, L]` rows, G = 1.
    """
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
