"""Regions of items whose records have none: the box around what the expert of the question marks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vilam3_jax.data.experts.labels import apply_group, label_group
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.volumes import slice_2d
from vilam3_jax.evals.items import Item


def with_regions(items: Sequence[Item], store: AnnotationStore) -> list[Item]:
    """The items, those about one slice with the box around all labels that their expert reports on it."""
    return [item if item.region else dataclasses.replace(item, region=_region(item, store)) for item in items]


def _region(item: Item, store: AnnotationStore) -> tuple[float, float, float, float] | None:
    if item.expert is None or len(item.images) != 1 or not item.input_keys:
        return None
    axis, index = item.images[0].axis, item.images[0].index
    if axis is None or index is None:
        return None
    annotation = store.get(item.input_keys[0], item.expert, item.args)
    if annotation is None or annotation.status != "ok" or annotation.labels is None:
        return None
    plane = apply_group(label_group(item.expert, item.args), annotation.label_slice(axis, index))
    marked = slice_2d(np.expand_dims(plane, axis), axis, 0) > 0  # [H, W], in display orientation
    if not marked.any():
        return None
    rows, columns = (np.flatnonzero(marked.any(axis=other)) for other in (1, 0))
    height, width = marked.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
