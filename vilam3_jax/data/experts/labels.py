"""The labels of segmentation experts, and which of them an argument selects.

The tables and groups are data, `tables/labels.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterable
from typing import TypeVar, cast

import numpy as np

from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, segments_on_slice

_LESION_WORDS = ("tumor", "lesion", "mass", "metastasis", "cyst")
_Number = TypeVar("_Number", int, float)


@dataclasses.dataclass(frozen=True)
class LabelGroup:
    """The labels that an expert argument selects."""

    names: dict[int, str]  # label id after merging to name
    target: dict[int, int]  # label id to the id it is merged into; other labels are not shown


@functools.cache
def _label_data() -> dict[str, dict[str, dict]]:
    data = importlib.resources.files("vilam3_jax.data.experts") / "tables" / "labels.json"
    return json.loads(data.read_text(encoding="utf-8"))


@functools.cache
def label_table(expert: str) -> dict[int, str]:
    """Label id to name of a known segmentation expert, empty for any other."""
    return {int(i): n for i, n in _label_data().get(expert, {"labels": {}})["labels"].items()}


def canonical_args(expert: str, args: str) -> str:
    """Replaces an alias (`hepatoma`) by the argument that cards list."""
    return _label_data().get(expert, {}).get("aliases", {}).get(args, args)


@functools.cache
def label_group(expert: str, args: str) -> LabelGroup | None:
    """The label group of `expert` for `args`; None means that every label is shown."""
    group = _label_data().get(expert, {"groups": {}})["groups"].get(args)
    if group is None:
        return None
    names, table = {}, label_table(expert)
    target = {i: i for i in group["ids"]}
    for name, members in group["merge"].items():
        into = min(members)
        names[into] = name
        target |= {i: into for i in members}
    return LabelGroup({i: names.get(i, table[i]) for i in set(target.values())}, target)


def label_universe(expert: str, args: str) -> dict[int, str]:
    """Label id to name of all labels that `expert` may report for `args`, after merging."""
    group = label_group(expert, args)
    return dict(group.names if group else label_table(expert))


def restrict_to_group(annotation: Annotation) -> Annotation:
    """Drops and merges labels by the annotation's own argument, in the map and in the measurements.

    `falsify` needs this form, so that a lobe cannot come back as the lung that contains it. The components of
    merged labels are summed, which is an upper bound.
    """
    group = label_group(annotation.expert, annotation.args)
    if group is None or annotation.status == "failed":
        return annotation
    merged: dict[int, Segment] = {}
    for s in annotation.segments:
        into = group.target.get(s.label_id)
        if into is None:
            continue
        if seen := merged.get(into):
            low, high = np.minimum(seen.bbox[:3], s.bbox[:3]), np.maximum(seen.bbox[3:], s.bbox[3:])
            s = dataclasses.replace(
                s,
                voxels=s.voxels + seen.voxels,
                volume_ml=s.volume_ml + seen.volume_ml,
                components=s.components + seen.components,
                bbox=cast(tuple[int, int, int, int, int, int], tuple(int(v) for v in (*low, *high))),
            )
        merged[into] = dataclasses.replace(s, label_id=into, name=group.names[into])
    labels, affine = annotation.labels, annotation.label_affine
    if affine is not None:
        labels = LabelMap.encode(apply_group(group, annotation.label_map()), affine)
    segments = tuple(merged[i] for i in sorted(merged))
    return dataclasses.replace(annotation, segments=segments, labels=labels)


@functools.lru_cache(4096)
def is_lesion(name: str) -> bool:
    """Whether a label names something countable, such as a tumor.

    >>> is_lesion("hepatic tumor"), is_lesion("bone lesion"), is_lesion("liver")
    (True, True, False)
    """
    return any(w in _LESION_WORDS or w.removesuffix("s") in _LESION_WORDS for w in name.lower().split())


def _sum_merged(annotation: Annotation, values: Iterable[tuple[int, _Number]]) -> dict[int, _Number]:
    """Sums (label id, value) pairs by the id that each label is merged into; drops hidden labels."""
    group = label_group(annotation.expert, annotation.args)
    sums: dict[int, _Number] = {}
    for label_id, value in values:
        into = label_id if group is None else group.target.get(label_id)
        if into is not None:
            sums[into] = sums[into] + value if into in sums else value
    return sums


def component_counts(annotation: Annotation) -> dict[int, int]:
    """Label id to number of components in the whole volume; an upper bound for merged labels."""
    return _sum_merged(annotation, ((s.label_id, s.components) for s in annotation.segments))


def merged_volumes(annotation: Annotation) -> dict[int, float]:
    """Label id to ml in the whole volume, of the labels that the annotation's argument selects."""
    return _sum_merged(annotation, ((s.label_id, s.volume_ml) for s in annotation.segments))


def apply_group(group: LabelGroup | None, labels: np.ndarray) -> np.ndarray:
    """Drops and merges labels, integers of any shape. Without a group they are returned unchanged."""
    if group is None:
        return labels
    table = np.zeros(65536, np.uint16)
    table[list(group.target)] = list(group.target.values())
    return table[labels]


def visible_segments(annotation: Annotation, *, axis: int, index: int) -> list[tuple[int, str, int, float]]:
    """(label id, name, voxels on the slice, ml in the whole volume) of the labels shown on a slice."""
    group = label_group(annotation.expert, annotation.args)
    names = group.names if group else annotation.label_names
    millilitres = merged_volumes(annotation)
    counts = _sum_merged(annotation, ((i, n) for i, _, n in segments_on_slice(annotation, axis, index)))
    return [(i, names[i], counts[i], millilitres[i]) for i in sorted(counts)]
