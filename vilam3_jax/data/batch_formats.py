"""Batch formats: packed rows (generative) or pairs of image and text (contrastive).

A *unit* is the part of a batch from one loader shard: a group of packed rows, or a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from vilam3_jax.data import packing, stream
from vilam3_jax.data.batches import Batch, PackedBatch, PairBatch, map_fields
from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.data.examples import Example
from vilam3_jax.data.image_processor import ImageProcessor, image_processor
from vilam3_jax.data.packing import GroupShape, Sample
from vilam3_jax.data.render import Outline, encode_example
from vilam3_jax.data.templates import Encoded, Template, TokenizerLike, encode_caption
from vilam3_jax.errors import UserError

Rows = list[list[Sample]]
Pull = Callable[[], Sample | None]
Grids = Sequence[tuple[int, int]]


class BatchFormat(Protocol):
    """How samples of a task become batches."""

    has_dialogues: ClassVar[bool]  # whether samples are dialogues, with experts and several images
    vocabulary: ClassVar[str]  # section of the model whose `vocab_size` bounds token ids
    processor: ImageProcessor  # image processor
    shape: GroupShape  # shape of a unit
    units: int  # number of units in the global batch

    def __init__(self, data: DataConfig, model: Any, pad_id: int = 0) -> None: ...

    def encode(
        self, tokenizer: TokenizerLike, template: Template, example: Example, outline: Outline, grids: Grids
    ) -> Encoded:
        """Tokens of a sample with the tile grids of its images."""
        ...

    def next_unit(self, pending: Sequence[Sample], pull: Pull) -> tuple[Rows, list[Sample]]:
        """The samples of the next unit, none at the end of the stream, and those left in the queue."""
        ...

    def assemble(self, rows: Sequence[Sequence[Sample]]) -> Any:
        """The batch of one unit; empty without samples."""
        ...


class PackedRows:
    """Dialogues, captions and documents, packed into rows that share image slots."""

    has_dialogues: ClassVar[bool] = True
    vocabulary: ClassVar[str] = "llm"

    def __init__(self, data: DataConfig, model: Any, pad_id: int = 0) -> None:
        """Reads the sizes of the sections `data` and `model`; `pad_id` is the token id of empty positions.

        Raises `UserError` if an image may not fit into a group.
        """
        self.processor = image_processor(model)
        self.units = data.groups
        self.shape = GroupShape(
            rows=data.rows_per_group,
            seq_len=data.seq_len,
            images=data.images_per_group,
            tokens_per_image=model.tokens_per_image,
            image_size=self.processor.size,
            pad_id=pad_id,
            tiled=bool(self.processor.sides),
        )
        self._check_room(data)

    def _check_room(self, data: DataConfig) -> None:
        inputs, markers = self.processor.max_inputs, self.processor.max_markers
        tokens = self.shape.tokens_per_image
        if inputs > max(data.images_per_group, 1):
            raise UserError(
                f"config data.images_per_group={data.images_per_group}, but an image may take {inputs} "
                f"inputs ({self.processor.max_tiles} tiles and a thumbnail); raise it, or lower "
                "model.max_tiles"
            )
        if inputs > 1 and markers * tokens > data.seq_len:
            raise UserError(
                f"config data.seq_len={data.seq_len}, but an image may take {markers} x {tokens} = "
                f"{markers * tokens} tokens; raise it or lower model.max_tiles"
            )

    def encode(
        self, tokenizer: TokenizerLike, template: Template, example: Example, outline: Outline, grids: Grids
    ) -> Encoded:
        turns = self.processor.expand(outline.turns, grids)
        tokens = self.shape.tokens_per_image
        encoded = encode_example(tokenizer, template, example.format, turns, tokens)
        return self.processor.merge(encoded, grids, tokens)

    def next_unit(self, pending: Sequence[Sample], pull: Pull) -> tuple[Rows, list[Sample]]:
        return packing.next_group(self.shape, pending, pull)

    def assemble(self, rows: Sequence[Sequence[Sample]]) -> PackedBatch:
        return packing.assemble_group(self.shape, rows or [[]] * self.shape.rows)


class Pairs:
    """One image with one caption in every row."""

    has_dialogues: ClassVar[bool] = False
    vocabulary: ClassVar[str] = "text_tower"

    def __init__(self, data: DataConfig, model: Any, pad_id: int = 0) -> None:
        self.processor = image_processor(model, pairs=True)
        self.units = data.global_pairs
        self.shape = GroupShape(
            rows=1,
            seq_len=data.text_len,
            images=1,
            tokens_per_image=0,
            image_size=self.processor.size,
            pad_id=pad_id,
        )

    def encode(
        self, tokenizer: TokenizerLike, template: Template, example: Example, outline: Outline, grids: Grids
    ) -> Encoded:
        return encode_caption(tokenizer, stream.pair_caption(example), self.shape.seq_len)

    def next_unit(self, pending: Sequence[Sample], pull: Pull) -> tuple[Rows, list[Sample]]:
        sample = pull()
        return ([] if sample is None else [[sample]]), []

    def assemble(self, rows: Sequence[Sequence[Sample]]) -> PairBatch:
        size, length = self.shape.image_size, self.shape.seq_len
        batch = PairBatch(
            images=np.zeros((1, size, size, 3), np.uint8),
            text_tokens=np.full((1, length), self.shape.pad_id, np.int32),
            text_valid=np.zeros((1, length), bool),
        )
        for sample in (sample for row in rows for sample in row):
            tokens = sample.encoded.tokens
            (batch.images[0],) = sample.read_images()
            batch.text_tokens[0, : len(tokens)] = tokens
            batch.text_valid[0, : len(tokens)] = True
        return batch


FORMATS: dict[str, type[BatchFormat]] = {"generative": PackedRows, "contrastive": Pairs}  # by task


def batch_shapes(batch_format: BatchFormat) -> Batch:
    """Returns the global batch as broadcast zeros, which take no memory: only shapes and dtypes matter."""

    def broadcast(_: str, value: np.ndarray) -> np.ndarray:
        shape = (batch_format.units * value.shape[0], *value.shape[1:])
        return np.broadcast_to(np.zeros((), value.dtype), shape)

    return map_fields(broadcast, batch_format.assemble(()))
