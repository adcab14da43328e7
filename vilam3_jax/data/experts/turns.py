"""What a model is shown of an expert's result: the turn's text, and the slice with coloured labels.

Rendered when an example is loaded, from an `Annotation`, for the slice the example shows. Which labels are
listed depends on the expert's argument (`organs`), by groups kept as data in `cards/labels.json`.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Literal, cast

import numpy as np

from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, segments_on_slice
from vilam3_jax.data.volumes import slice_2d

Kind = Literal["segmentation", "classification"]

ALPHA = 0.3
# VILA-M3's colours in VILA-M3's order (`orange` stands twice there), with the CSS values of scikit-image.
PALETTE: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("red", (1.0, 0.0, 0.0)),
    ("blue", (0.0, 0.0, 1.0)),
    ("yellow", (1.0, 1.0, 0.0)),
    ("magenta", (1.0, 0.0, 1.0)),
    ("green", (0.0, 0.502, 0.0)),
    ("indigo", (0.294, 0.0, 0.51)),
    ("darkorange", (1.0, 0.549, 0.0)),
    ("cyan", (0.0, 1.0, 1.0)),
    ("pink", (1.0, 0.753, 0.796)),
    ("brown", (0.647, 0.165, 0.165)),
    ("orange", (1.0, 0.647, 0.0)),
    ("lime", (0.0, 1.0, 0.0)),
    ("orange", (1.0, 0.647, 0.0)),
    ("gold", (1.0, 0.843, 0.0)),
    ("yellowgreen", (0.604, 0.804, 0.196)),
    ("darkgreen", (0.0, 0.392, 0.0)),
)

NO_RESULT = "The expert could not analyse this image. Respond to this prompt:\n{question}"


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
        labels = LabelMap.encode(_apply(group, annotation.label_map()), affine)
    segments = tuple(merged[i] for i in sorted(merged))
    return dataclasses.replace(annotation, segments=segments, labels=labels)


def _apply(group: LabelGroup | None, labels: np.ndarray) -> np.ndarray:
    if group is None:
        return labels
    table = np.zeros(65536, np.uint16)
    for i, into in group.target.items():
        table[i] = into
    return table[labels]


def legend(names: Mapping[int, str], present: list[int]) -> dict[str, str]:
    """Colour to what it shows; colours cycle over the label ids `present` on the slice, in sorted order.

    Args:
      names: label id to name. A label without a name takes a colour but is not listed.
      present: label ids on the slice, without 0.
    """
    out: dict[str, str] = {}
    for i, label_id in enumerate(sorted(present)):
        colour = PALETTE[i % len(PALETTE)][0]
        if label_id in names:
            # Beyond 16 labels (12, for orange) colours repeat: both names are told, none is lost.
            known = out.get(colour)
            out[colour] = f"{known} and {names[label_id]}" if known else names[label_id]
    return out


def overlay(
    image: np.ndarray, label_slice: np.ndarray, names: Mapping[int, str], alpha: float = ALPHA
) -> tuple[np.ndarray, dict[str, str]]:
    """Colours the labels of a slice; the background keeps the image.

    Same formula as scikit-image's `label2rgb(kind='overlay', bg_label=0, bg_color=None)`, whose result on
    grey images is matched to one grey level (it takes a detour through HSV).

    Args:
      image: uint8 [H, W, 3].
      label_slice: integers [h, w], 0 is background; brought to H x W by nearest neighbour.
      names: label id to name.
      alpha: share of the colour.

    Returns:
      (uint8 [H, W, 3], colour to name of what is visible).

    Raises:
      ValueError: wrong dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or label_slice.ndim != 2:
        raise ValueError(
            f"overlay needs uint8 [H, W, 3] and labels [h, w], got {image.dtype} {image.shape} "
            f"and {label_slice.shape}"
        )
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
        for n, m in zip(image.shape[:2], label_slice.shape, strict=True)
    )
    present = [int(i) for i in np.unique(label_slice) if i]
    labels = label_slice[rows[:, None], columns[None, :]]
    out = image.copy()
    for i, label_id in enumerate(present):
        where = labels == label_id
        colour = np.array(PALETTE[i % len(PALETTE)][1])
        out[where] = ((colour * alpha + image[where] / 255.0 * (1.0 - alpha)) * 255.0).astype(np.uint8)
    return out, legend(names, present)


def expert_overlay(annotation: Annotation, image: np.ndarray, *, axis: int, index: int) -> np.ndarray:
    """The picture that stands for `<image>` in a segmentation expert's turn.

    Args:
      annotation: a successful record with a label map.
      image: uint8 [H, W, 3], the slice in display orientation (`volumes.slice_2d`), of any size.
      axis, index: which slice `image` is.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: no label map. IndexError: no such slice.
    """
    group = label_group(annotation.expert, annotation.args)
    plane = _apply(group, annotation.label_slice(axis, index))
    shown = slice_2d(np.expand_dims(plane, axis), axis, 0)
    return overlay(image, shown, group.names if group else annotation.label_names)[0]


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


def _millilitres(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def shows_image(annotation: Annotation, kind: Kind) -> bool:
    """Whether the expert's turn holds an `<image>` marker, to be filled by `expert_overlay`."""
    return kind == "segmentation" and annotation.status == "ok" and annotation.labels is not None


def render_expert_turn(
    annotation: Annotation,
    question: str,
    *,
    axis: int | None = None,
    index: int | None = None,
    kind: Kind,
    threshold: float = 0.5,
) -> str:
    """The text of the turn in which the expert speaks.

    Args:
      annotation: what the expert said; a failed one is told as such.
      question: the question that the model shall go on to answer.
      axis, index: the slice shown; needed for a segmentation.
      kind: what sort of expert it is.
      threshold: a class is told as `yes` above it.

    Raises:
      ValueError: a segmentation without slice or label map, a classification without probabilities.
      IndexError: no such slice.
    """
    if annotation.status == "failed":
        return NO_RESULT.format(question=question)
    if kind == "classification":
        if not annotation.probabilities:
            raise ValueError(f"annotation of {annotation.expert} has no probabilities")
        lines = [
            f"{name.lower().replace('_', ' ')}: {'yes' if p > threshold else 'no'} ({p:.2f})\n"
            for name, p in annotation.probabilities.items()
        ]
        return (
            "The resulting predictions are:\n" + "".join(lines) + "Analyze the image and take these "
            f"predictions into account when responding to this prompt:\n{question}"
        )
    if axis is None or index is None:
        raise ValueError("a segmentation is rendered for a slice: give axis and index")
    visible = visible_segments(annotation, axis=axis, index=index)
    if not visible:
        found = "No labelled structure is visible in this image."
    else:
        colours = legend({i: name for i, name, _, _ in visible}, [i for i, *_ in visible])
        found = "The colors in this image describe {}. Volumes in ml: {}.".format(
            ", ".join(f"{colour}: {name}" for colour, name in colours.items()),
            ", ".join(f"{name} {_millilitres(ml)}" for _, name, _, ml in visible),
        )
    return f"The results are <image>. {found} Use this result to respond to this prompt:\n{question}"
