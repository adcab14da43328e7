"""Sizes of the batches that a config asks for: groups of packed rows, or pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from vilam3_jax.data import packing
from vilam3_jax.data.batches import Batch, PairBatch, arrays, of_arrays
from vilam3_jax.data.image_processor import ImageProcessor, image_processor
from vilam3_jax.data.packing import GroupShape
from vilam3_jax.errors import UserError


def batch_shapes(cfg: Any, tokens_per_image: int) -> Batch:
    """The global batch of a config's loader without its values; opens no data.

    Returns:
      Arrays of the right shapes and dtypes that share one element, so they take no memory.

    Raises:
      UserError: a picture has no place in a group.
    """
    pairs = cfg.kind == "contrastive"
    processor = image_processor(cfg.model, pairs=pairs)
    shape = group_shape(cfg, processor, tokens_per_image, pad_id=0)
    if not pairs:
        check_room(cfg.data, processor, tokens_per_image)
    unit = arrays(empty_pairs(shape, 1) if pairs else packing.assemble_group(shape, [[]] * shape.rows))
    units = global_units(cfg)
    return of_arrays(
        {
            name: np.broadcast_to(np.zeros((), value.dtype), (units * value.shape[0], *value.shape[1:]))
            for name, value in unit.items()
        }
    )


def global_units(cfg: Any) -> int:
    """Groups, or pairs, of the global batch."""
    data = cfg.data
    return data.global_pairs if cfg.kind == "contrastive" else data.global_rows // data.rows_per_group


def group_shape(cfg: Any, processor: ImageProcessor, tokens_per_image: int, pad_id: int) -> GroupShape:
    """Sizes of a group of the config's batches; of pairs, `seq_len` is that of the captions."""
    pairs = cfg.kind == "contrastive"
    return GroupShape(
        rows=cfg.data.rows_per_group,
        seq_len=cfg.data.text_len if pairs else cfg.data.seq_len,
        images=1 if pairs else cfg.data.images_per_group,
        tokens_per_image=tokens_per_image,
        image_size=processor.size,
        pad_id=pad_id,
        tiled=bool(processor.sides),
    )


def empty_pairs(shape: GroupShape, count: int) -> PairBatch:
    """Rows that hold no pair yet."""
    size, length = shape.image_size, shape.seq_len
    return PairBatch(
        images=np.zeros((count, size, size, 3), np.uint8),
        text_tokens=np.full((count, length), shape.pad_id, np.int32),
        text_valid=np.zeros((count, length), bool),
    )


def check_room(data: Any, processor: ImageProcessor, tokens_per_image: int) -> None:
    """Refuses sizes of groups in which a picture with the most tiles has no place."""
    inputs, markers = processor.max_inputs, processor.max_markers
    if inputs > max(data.images_per_group, 1):
        raise UserError(
            f"config data.images_per_group={data.images_per_group}, but an image may take {inputs} inputs "
            f"({processor.max_tiles} tiles and the whole in small); raise it or lower model.max_tiles"
        )
    if inputs > 1 and markers * tokens_per_image > data.seq_len:
        raise UserError(
            f"config data.seq_len={data.seq_len}, but an image may take {markers} x {tokens_per_image} = "
            f"{markers * tokens_per_image} tokens; raise it or lower model.max_tiles"
        )
