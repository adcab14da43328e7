"""Packing: samples of different lengths into groups of fixed shape, tokens and images together.

A group is R rows of L tokens that share M image slots; it lives on one device. Which samples share a group
depends on their order and sizes alone, never on threads or clocks, so a few integers resume exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vilam3_jax.data.templates import Encoded

NO_GRID = (1, 0, 1, 0)  # rows, row, columns, column of an input that is no tile of a grid
LOOKAHEAD = 32  # samples kept waiting for a place; more would fill little better and hold more images


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
      encoded: its tokens.
      images: its inputs of the vision tower in the order of their markers, each uint8 [S, S, 3].
      tile_map: int32 [inputs, 5], see `ImageProcessor.tile_map`; None where tiles stay apart.
    """

    id: str
    index: int
    encoded: Encoded
    images: tuple[np.ndarray, ...] = ()
    tile_map: np.ndarray | None = None


def oversize_reason(shape: GroupShape, sample: Sample) -> str | None:
    """Returns why a sample can never be packed, or None."""
    if len(sample.encoded) > shape.seq_len:
        return f"{len(sample.encoded)} tokens, a row has {shape.seq_len}; raise data.seq_len"
    if len(sample.images) > shape.images:
        return f"{len(sample.images)} images, a group has {shape.images}; raise data.images_per_group"
    return None


def next_group(
    shape: GroupShape,
    pending: Sequence[Sample],
    pull: Callable[[], Sample | None],
    lookahead: int = LOOKAHEAD,
) -> tuple[list[list[Sample]], list[Sample]]:
    """Fills one group, first-fit in order of arrival.

    Waiting samples come first, so the oldest always gets a place and none waits for ever.

    Args:
      shape: sizes; no sample may be oversized.
      pending: samples left over from the group before.
      pull: gives the next sample of the stream, None at its end.
      lookahead: stop when this many samples wait.

    Returns:
      (samples of each row, samples that wait for the next group). All rows are empty only at the end.
    """
    rows: list[list[Sample]] = [[] for _ in range(shape.rows)]
    free = [shape.seq_len] * shape.rows
    slots = shape.images

    def place(sample: Sample) -> bool:
        nonlocal slots
        if len(sample.images) > slots:
            return False
        for row, room in enumerate(free):
            if len(sample.encoded) <= room:
                rows[row].append(sample)
                free[row] -= len(sample.encoded)
                slots -= len(sample.images)
                return True
        return False

    waiting = [sample for sample in pending if not place(sample)]
    while len(waiting) < lookahead and any(free):
        sample = pull()
        if sample is None:
            break
        if not place(sample):
            waiting.append(sample)
    return rows, waiting


def assemble_group(shape: GroupShape, rows: Sequence[Sequence[Sample]]) -> dict[str, np.ndarray]:
    """Writes a group's arrays.

    Returns:
      `tokens`, `segment_ids`, `positions`, `visual_index`: int32 [R, L]; `loss_weights`: float32 [R, L], the
      weight of each token as a target (the first of a segment is none); `images`: uint8 [M, S, S, 3];
      `image_valid`: bool [M]; if tiled, `image_tiles`: int32 [M, 5], tile maps whose first input is one
      of the group's slots.
    """
    flat = (shape.rows, shape.seq_len)
    group = {
        "tokens": np.full(flat, shape.pad_id, np.int32),
        "segment_ids": np.zeros(flat, np.int32),
        "positions": np.zeros(flat, np.int32),
        "loss_weights": np.zeros(flat, np.float32),
        "images": np.zeros((shape.images, shape.image_size, shape.image_size, 3), np.uint8),
        "image_valid": np.zeros(shape.images, bool),
        "visual_index": np.full(flat, -1, np.int32),
    }
    if shape.tiled:
        group["image_tiles"] = np.tile(np.asarray((0, *NO_GRID), np.int32), (shape.images, 1))
    slot = 0
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, start=1):
            encoded = sample.encoded
            where = (row, slice(start, start + len(encoded)))
            group["tokens"][where] = encoded.tokens
            group["segment_ids"][where] = segment
            group["positions"][where] = np.arange(len(encoded))
            group["loss_weights"][where] = encoded.loss_mask
            group["loss_weights"][row, start] = 0.0
            index = (slot + encoded.image_of_token) * shape.tokens_per_image + encoded.visual_offset
            group["visual_index"][where] = np.where(encoded.image_of_token >= 0, index, -1)
            if sample.tile_map is not None:
                tiles = group["image_tiles"][slot : slot + len(sample.images)]
                tiles[:] = sample.tile_map
                tiles[:, 0] += slot
            for image in sample.images:
                group["images"][slot] = image
                group["image_valid"][slot] = True
                slot += 1
            start += len(encoded)
    return group


def stack_groups(groups: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins groups into a batch: rows one after the other, `[B, L]`; images `[G, M, S, S, 3]`."""
    return {
        key: (np.stack if key.startswith("image") else np.concatenate)([g[key] for g in groups])
        for key in groups[0]
    }
