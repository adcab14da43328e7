"""Selection and numbering of the slices of a volume that a model sees.

Training selects slices when an example is loaded; inference numbers its slices with the same words.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from vilam3_jax.data.data_config import SLICE_CHOICES
from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.data.experts.labels import is_lesion, label_group
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.intensity import window_to_uint8
from vilam3_jax.data.preprocessing import Preprocessing, Window
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError

_SIDE = 64  # maximum voxels per side of the grid on which entropies are measured
_LEVELS = 32


@dataclasses.dataclass(frozen=True)
class SliceRule:
    """How many slices of a volume are shown, and which.

    Attributes:
      count: maximum number of slices per volume.
      choice: `even`: evenly spaced; `informative`: the slice of highest entropy in each of `count` equal
        parts; `finding`: evenly spaced over the labels of an expert, lesions before organs, including the
        slice with most labelled voxels; `even` if there are none.
    """

    count: int = 4
    choice: str = "even"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"config data.volume_slices={self.count}: must be at least 1")
        if self.choice not in SLICE_CHOICES:
            raise UserError(
                f"config data.slice_choice={self.choice!r}: use one of {', '.join(SLICE_CHOICES)}"
            )


def numbered(indices: Sequence[int], planes: int) -> str:
    """The markers of slices `indices` (from 0) of `planes`, one per line: `slice 12 of 60: <image>`."""
    return "\n".join(f"slice {index + 1} of {planes}: {IMAGE_MARKER}" for index in indices)


def with_markers(text: str, markers: Sequence[str]) -> str:
    """Replaces the image markers of a text; raises `ValueError` for another number of `markers`."""
    first, *rest = text.split(IMAGE_MARKER)
    return first + "".join(marker + part for marker, part in zip(markers, rest, strict=True))


def most_labelled(voxels: np.ndarray, indices: Sequence[int]) -> int:
    """The position in `indices` of the first slice with most labelled voxels; see `labelled_voxels`."""
    return max(range(len(indices)), key=lambda place: voxels[indices[place]])


def even_slices(planes: int, count: int) -> tuple[int, ...]:
    """The middle planes of `count` equal parts of a volume; all planes if there are fewer."""
    count = min(planes, count)
    return tuple((2 * part + 1) * planes // (2 * count) for part in range(count))


def informative_slices(
    volume: Volume, axis: int, count: int, preprocessing: Preprocessing, window: Window | None = None
) -> tuple[int, ...]:
    """The plane of highest entropy in each of `count` equal parts of a volume.

    Entropy is that of the grey values in the model's first window, in 32 steps, on a grid of at most 64
    voxels per side. It is 0 for uniform background.
    """
    planes = volume.voxels.shape[axis]
    count = min(planes, count)
    entropies = _entropies(volume, axis, preprocessing, window)
    borders = [part * planes // count for part in range(count + 1)]
    parts = itertools.pairwise(borders)
    return tuple(int(first + np.argmax(entropies[first:last])) for first, last in parts)


def _entropies(volume: Volume, axis: int, preprocessing: Preprocessing, window: Window | None) -> np.ndarray:
    """Entropy of each plane in bits, float64 [planes]."""

    def thinned(array: np.ndarray) -> np.ndarray:
        stacked = np.moveaxis(array, axis, 0)
        return stacked[:, :: -(-stacked.shape[1] // _SIDE), :: -(-stacked.shape[2] // _SIDE)]

    windows = preprocessing.windows(volume, window)
    limits = None if windows else volume.percentile_limits(preprocessing.percentiles)
    grey = window_to_uint8(thinned(volume.voxels), windows[0] if windows else None, limits)
    if volume.valid is not None:
        grey = np.where(thinned(volume.valid), grey, 0)
    planes = len(grey)
    steps = grey.reshape(planes, -1).astype(np.int64) * _LEVELS // 256 + _LEVELS * np.arange(planes)[:, None]
    counts = np.bincount(steps.ravel(), minlength=planes * _LEVELS).reshape(planes, _LEVELS)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(axis=1)


def finding_slices(annotation: Annotation, axis: int, count: int) -> tuple[int, ...]:
    """Planes over the labels of an expert; () if there are none. Raises `ValueError` for a damaged map."""
    voxels = labelled_voxels(annotation, axis)
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


def labelled_voxels(annotation: Annotation, axis: int) -> np.ndarray:
    """Labelled voxels per plane, int64 [planes]; only lesions if there are any.

    Raises `ValueError` for a missing or damaged label map.
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
