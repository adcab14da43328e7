"""Batches of a loader, as dataclasses of NumPy arrays; `tasks/task.py` registers them as pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """Packed rows of tokens with the images that they refer to.

    B rows form G = B / R groups of R rows. A group lives on one device and has M image slots; an image takes
    T positions of a row.

    Attributes:
      tokens: int32 [B, L]; the pad id at image positions and at padding.
      segment_ids: int32 [B, L], samples of a row from 1; 0 is padding.
      positions: int32 [B, L], from 0 in every segment.
      loss_weights: float32 [B, L], weight of each token as a target; 0 for the first of a segment.
      visual_index: int32 [B, L], index among the group's M * T image tokens; -1 for text.
      images: uint8 [G, M, S, S, 3], inputs of the vision tower; zeros in empty slots.
      image_valid: bool [G, M], slots that hold an image.
      image_tiles: int32 [G, M, 5], see `ImageProcessor.tile_map`; None outside 'dynamic_s2'.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    loss_weights: Any
    visual_index: Any
    images: Any
    image_valid: Any
    image_tiles: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class PairBatch:
    """Images with their captions, one pair per row.

    Attributes:
      images: uint8 [B, S, S, 3].
      text_tokens: int32 [B, T]; the pad id after a caption.
      text_valid: bool [B, T], True for tokens; all False in a row without a pair.
    """

    images: Any
    text_tokens: Any
    text_valid: Any


Batch = PackedBatch | PairBatch
AnyBatch = TypeVar("AnyBatch", bound=Batch)
# Fields whose second axis is the length of packed rows; they have B leading rows, other fields G groups.
SEQUENCE_FIELDS = ("tokens", "segment_ids", "positions", "loss_weights", "visual_index")


def arrays(batch: Batch) -> dict[str, Any]:
    """Field name → array; fields that are None are left out."""
    found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in found.items() if value is not None}


def map_fields(function: Callable[[str, Any], Any], batch: AnyBatch) -> AnyBatch:
    """A batch of what `function(field name, array)` returns."""
    return type(batch)(**{name: function(name, value) for name, value in arrays(batch).items()})


def join(parts: Sequence[AnyBatch]) -> AnyBatch:
    """Joins batches along their leading axes; a single one is returned unchanged."""
    if len(parts) == 1:
        return parts[0]
    each = [arrays(part) for part in parts]
    return type(parts[0])(**{name: np.concatenate([own[name] for own in each]) for name in each[0]})
