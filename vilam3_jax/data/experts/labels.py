"""The labels of segmentation experts, and which of them an argument asks for.

Tables and groups are data, `tables/labels.json`.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import cast

import numpy as np

from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, segments_on_slice

_LESION_WORDS = ("tumor", "lesion", "mass", "metastasis", "cyst")


@dataclasses.dataclass(frozen=True)
class LabelGroup:
    """The labels that one expert argument asks for.

    Attributes:
      names: label id to name, after merging.
      target: label id of the map to the id it is merged into; ids that are missing here are not shown.
    """

    names: dict[int, str]
    target: dict[int, int]


@functools.cache
def _label_data() -> dict[str, dict[str, dict]]:
    data = importlib.resources.files("vilam3_jax.data.experts") / "tables" / "labels.json"
    return json.loads(data.read_text(encoding="utf-8"))


@functools.cache
def label_table(expert: str) -> dict[int, str]:
    """Label id to name of a known segmentation expert, empty for any other."""
    return {int(i): n for i, n in _label_data().get(expert, {"labels": {}})["labels"].items()}


def canonical_args(expert: str, args: str) -> str:
    """The argument as cards list it: another name of one (`hepatoma`) is replaced."""
    return _label_data().get(expert, {}).get("aliases", {}).get(args, args)


@functools.cache
def label_group(expert: str, args: str) -> LabelGroup | None:
    """The label group of `expert` for `args`; None if there is none: then every label is shown."""
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
    """Label id to name of all that `expert` may name for `args` (after merging), for `falsify`."""
    group = label_group(expert, args)
    return dict(group.names if group else label_table(expert))


def restrict_to_group(annotation: Annotation) -> Annotation:
    """Drops and merges labels as the annotation's own argument says, in the map and in the figures.

    `falsify` wants this form, so that a lobe cannot come back as the lung it was taken from. Components of
    merged labels are summed: an upper bound.
    """
    group = label_group(annotation.expert, annotation.args)
    if group is None or annotation.status == "failed":
        return annotation
    merged: dict[int, Segment] = {}
    for s in annotation.segments:
        into = group.target.get(s.label_id)
        if into is None:
            continue
        seen = merged.get(into)
        box = s.bbox
        if seen:
            low, high = np.minimum(seen.bbox[:3], box[:3]), np.maximum(seen.bbox[3:], box[3:])
            box = cast(tuple[int, int, int, int, int, int], tuple(int(v) for v in (*low, *high)))
        merged[into] = Segment(
            into,
            group.names[into],
            s.voxels + (seen.voxels if seen else 0),
            s.volume_ml + (seen.volume_ml if seen else 0.0),
            s.components + (seen.components if seen else 0),
            box,
        )
    labels, affine = annotation.labels, annotation.label_affine
    if affine is not None:
        labels = LabelMap.encode(apply_group(group, annotation.label_map()), affine)
    segments = tuple(merged[i] for i in sorted(merged))
    return dataclasses.replace(annotation, segments=segments, labels=labels)


@functools.lru_cache(4096)
def is_lesion(name: str) -> bool:
    """Whether a label stands for something that is counted, such as a tumor.

    >>> is_lesion("hepatic tumor"), is_lesion("bone lesion"), is_lesion("liver")
    (True, True, False)
    """
    return any(w in _LESION_WORDS or w.removesuffix("s") in _LESION_WORDS for w in name.lower().split())


def component_counts(annotation: Annotation) -> dict[int, int]:
    """Label id to the number of separate parts in the whole volume, after merging (then an upper bound)."""
    group = label_group(annotation.expert, annotation.args)
    counts: dict[int, int] = {}
    for s in annotation.segments:
        into = s.label_id if group is None else group.target.get(s.label_id)
        if into is not None:
            counts[into] = counts.get(into, 0) + s.components
    return counts


def apply_group(group: LabelGroup | None, labels: np.ndarray) -> np.ndarray:
    """Drops and merges labels, integers of any shape; all stay as they are without a group."""
    if group is None:
        return labels
    table = np.zeros(65536, np.uint16)
    for i, into in group.target.items():
        table[i] = into
    return table[labels]


def visible_segments(annotation: Annotation, *, axis: int, index: int) -> list[tuple[int, str, int, float]]:
    """(label id, name, voxels on the slice, ml in the whole volume) of the labels shown on a slice."""
    group = label_group(annotation.expert, annotation.args)
    millilitres: dict[int, float] = {}
    for s in annotation.segments:
        into = s.label_id if group is None else group.target.get(s.label_id)
        if into is not None:
            millilitres[into] = millilitres.get(into, 0.0) + s.volume_ml
    counts: dict[int, int] = {}
    for label_id, _, voxels in segments_on_slice(annotation, axis, index):
        into = label_id if group is None else group.target.get(label_id)
        if into is not None:
            counts[into] = counts.get(into, 0) + voxels
    names = group.names if group else annotation.label_names
    return [(i, names[i], counts[i], millilitres[i]) for i in sorted(counts)]
