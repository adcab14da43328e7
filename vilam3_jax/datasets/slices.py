"""Choice of slices from a volume."""

from __future__ import annotations

import itertools
import random

import numpy as np

from vilam3_jax.data.volumes import Volume

PLANE_OF_AXIS = ("sagittal", "coronal", "axial")
MIN_PIXELS = 20  # a structure with 1 to 19 pixels in a slice is uncertain, and no question asks about it
_MIN_BODY = 0.25  # share of the fullest slice of the same plane


def body_slices(volume: Volume, axis: int) -> np.ndarray:
    """Which slices along `axis` show enough of the body, [n] bool.

    Foreground is above -300 HU in a CT with air around the body, else above a tenth of the display range: CT
    templates have an empty background of 0.
    """
    low, high = volume.limits
    threshold = -300.0 if volume.modality == "CT" and low < -500 else low + 0.1 * (high - low)
    profile = (volume.voxels > threshold).mean(axis=tuple(i for i in range(3) if i != axis))
    return profile >= max(0.02, _MIN_BODY * profile.max())


def pick(candidates: list[int], count: int, rng: random.Random) -> list[int]:
    """At most `count` of the candidates, evenly spread with a little jitter, ascending."""
    if len(candidates) <= count:
        return list(candidates)
    edges = np.linspace(0, len(candidates), count + 1).astype(int)
    return [candidates[rng.randrange(a, b)] for a, b in itertools.pairwise(edges)]


def pick_halves(one: list[int], other: list[int], count: int, rng: random.Random) -> list[int]:
    """Picks `count` values, half from each list as far as they last; ascending."""
    fewer, more = sorted((one, other), key=len)
    first = pick(fewer, max(1, count // 2), rng)
    return sorted(first + pick(more, count - len(first), rng))
