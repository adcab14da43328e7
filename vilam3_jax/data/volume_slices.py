"""Which slices of a whole volume a model sees, and the words that number them.

Training chooses slices when an example is loaded; inference numbers its slices with the same words.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.data.experts.labels import is_lesion, label_group
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.intensity import window_to_uint8
from vilam3_jax.data.preprocessing import Preprocessing, Window
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError

CHOICES = ("even", "informative", "finding")
_SIDE = 64  # voxels of a slice, at most, along each side that an entropy is measured of
_GREYS = 32


@dataclasses.dataclass(frozen=True)
class SliceRule:
    """How many slices of a whole volume are shown, and which.

    Attributes:
      count: most slices of a volume.
      choice: `even`: evenly spaced; `informative`: of as many equal parts of the volume, the slice of the
        highest entropy each; `finding`: evenly spaced over what an expert marked, lesions before organs, the
        slice that shows most of it among them; `even` where nothing is marked.
    """

    count: int = 4
    choice: str = "even"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"config data.volume_slices={self.count}: must be at least 1")
        if self.choice not in CHOICES:
            raise UserError(f"config data.slice_choice={self.choice!r}: use one of {', '.join(CHOICES)}")


def numbered(indices: Sequence[int], planes: int) -> str:
    """The image markers of slices of one volume, a line each: `slice 12 of 60: <image>`.

    Args:
      indices: from 0, in the order of the markers.
      planes: of the volume along the axis.
    """
    return "\n".join(f"slice {index + 1} of {planes}: {IMAGE_MARKER}" for index in indices)


def with_markers(text: str, markers: Sequence[str]) -> str:
    """A text with other words in the place of its image markers.

    Raises:
      ValueError: not one for each marker.
    """
    first, *rest = text.split(IMAGE_MARKER)
    return first + "".join(marker + part for marker, part in zip(markers, rest, strict=True))


def most_marked(voxels: np.ndarray, indices: Sequence[int]) -> int:
    """Which of some slices an expert's result is shown on: the place of the first that it marks most of.

    Args:
      voxels: of each plane, see `marked_voxels`.
      indices: of the slices.
    """
    return max(range(len(indices)), key=lambda place: voxels[indices[place]])


def even_slices(planes: int, count: int) -> tuple[int, ...]:
    """The middle planes of `count` equal parts of a volume; all planes if there are fewer."""
    count = min(planes, count)
    return tuple((2 * part + 1) * planes // (2 * count) for part in range(count))


def informative_slices(
    volume: Volume, axis: int, count: int, preprocessing: Preprocessing, window: Window | None = None
) -> tuple[int, ...]:
    """Of each of `count` equal parts of a volume, the plane of the highest entropy.

    The entropy is that of the grey values as the model sees them: in its first window, in 32 steps, on a grid
    of at most 64 voxels a side. Background alone has none.
    """
    planes = volume.voxels.shape[axis]
    count = min(planes, count)
    entropies = _entropies(volume, axis, preprocessing, window)
    borders = [part * planes // count for part in range(count + 1)]
    parts = itertools.pairwise(borders)
    return tuple(int(first + np.argmax(entropies[first:last])) for first, last in parts)


def _entropies(volume: Volume, axis: int, preprocessing: Preprocessing, window: Window | None) -> np.ndarray:
    """Bits of each plane, float64 [planes]."""

    def thinned(array: np.ndarray) -> np.ndarray:
        stacked = np.moveaxis(array, axis, 0)
        return stacked[:, :: -(-stacked.shape[1] // _SIDE), :: -(-stacked.shape[2] // _SIDE)]

    windows = preprocessing.windows(volume, window)
    limits = None if windows else volume.percentile_limits(preprocessing.percentiles)
    grey = window_to_uint8(thinned(volume.voxels), windows[0] if windows else None, limits)
    if volume.valid is not None:
        grey = np.where(thinned(volume.valid), grey, 0)
    planes = len(grey)
    steps = grey.reshape(planes, -1).astype(np.int64) * _GREYS // 256 + _GREYS * np.arange(planes)[:, None]
    counts = np.bincount(steps.ravel(), minlength=planes * _GREYS).reshape(planes, _GREYS)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(axis=1)


def finding_slices(annotation: Annotation, axis: int, count: int) -> tuple[int, ...]:
    """Planes over what an expert marked; () if it marked nothing.

    Raises:
      ValueError: the label map is damaged.
    """
    voxels = marked_voxels(annotation, axis)
    marked = np.flatnonzero(voxels)
    if not len(marked):
        return ()
    first, last = int(marked[0]), int(marked[-1])
    count = min(len(voxels), count)
    if last - first + 1 <= count:
        first = min(max(0, (first + last + 1 - count) // 2), len(voxels) - count)
        return tuple(range(first, first + count))
    chosen = [first + place for place in even_slices(last - first + 1, count)]
    most = int(np.argmax(voxels))
    nearest = min(range(count), key=lambda place: abs(chosen[place] - most))
    chosen[nearest] = most
    return tuple(chosen)


def marked_voxels(annotation: Annotation, axis: int) -> np.ndarray:
    """Voxels of each plane that the labels of a call mark, lesions alone if there are any; int64 [planes].

    Raises:
      ValueError: there is no label map, or it is damaged.
    """
    group = label_group(annotation.expert, annotation.args)
    names = {s.label_id: s.name for s in annotation.segments if group is None}
    if group is not None:
        targets = {s.label_id: group.target.get(s.label_id) for s in annotation.segments}
        names = {label_id: group.names[into] for label_id, into in targets.items() if into is not None}
    lesions = [label_id for label_id, name in names.items() if is_lesion(name)]
    labels = annotation.label_map()
    table = np.zeros(max([0, *names, int(labels.max(initial=0))]) + 1, bool)
    table[lesions or list(names)] = True
    others = tuple(other for other in range(3) if other != axis)
    return np.count_nonzero(table[labels], axis=others)
