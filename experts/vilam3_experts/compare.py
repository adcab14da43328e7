"""Where two experts disagree on the same input.

Only labels and classes whose names both experts know are compared. A label that only one of them found counts
as a disagreement if the other one knows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vilam3_jax.data.experts.labels import label_universe
from vilam3_jax.data.experts.record import Annotation, Disagreement

DICE = "dice"
PROBABILITY = "probability difference"
_SAME_PLACE_MM = 1e-3


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """A smaller Dice, or a larger difference of probabilities, is a disagreement."""

    dice: float = 0.7
    difference: float = 0.3


def compare(
    first: Annotation, second: Annotation, thresholds: Thresholds = Thresholds()
) -> list[Disagreement]:
    """The disagreements of `second` with `first`, sorted by name, as stored in the record of `first`.

    Empty if one of the two failed. Label maps on different grids are not compared.
    """
    if first.input_key != second.input_key:
        raise ValueError("cannot compare records of different inputs")
    if first.status != "ok" or second.status != "ok":
        return []
    overlaps, differences = label_overlaps(first, second), probability_differences(first, second)
    found = [(name, DICE, value) for name, value in overlaps.items() if value < thresholds.dice]
    found += [(name, PROBABILITY, v) for name, v in differences.items() if v > thresholds.difference]
    return [
        Disagreement(second.expert, second.args, second.version, name, measure, value)
        for name, measure, value in sorted(found)
    ]


def label_overlaps(first: Annotation, second: Annotation) -> dict[str, float]:
    """Dice coefficient, `2 |A and B| / (|A| + |B|)`, of each label that both know and at least one found."""
    if first.labels is None or second.labels is None or first.labels.shape != second.labels.shape:
        return {}
    if np.abs(np.subtract(first.labels.affine, second.labels.affine)).max() > _SAME_PLACE_MM:
        return {}
    ids = [{_plain(s.name): s.label_id for s in a.segments} for a in (first, second)]
    sizes = [{_plain(s.name): s.voxels for s in a.segments} for a in (first, second)]
    known = [
        set(found) | {_plain(n) for n in label_universe(a.expert, a.args).values()}
        for found, a in zip(ids, (first, second), strict=True)
    ]
    common = (ids[0].keys() | ids[1].keys()) & known[0] & known[1]
    both = [name for name in sorted(common) if name in ids[0] and name in ids[1]]
    overlap = dict.fromkeys(both, 0)
    for z in range(first.labels.shape[2] if both else 0):
        one, two = first.labels.plane(z), second.labels.plane(z)
        for name in both:
            overlap[name] += int(((one == ids[0][name]) & (two == ids[1][name])).sum())
    return {
        name: 2 * overlap.get(name, 0) / (sizes[0].get(name, 0) + sizes[1].get(name, 0))
        for name in sorted(common)
    }


def probability_differences(first: Annotation, second: Annotation) -> dict[str, float]:
    """Absolute difference of the probabilities of each class; calibrated ones where available."""
    one, two = (
        {_plain(name): p for name, p in {**a.probabilities, **a.calibrated}.items()} for a in (first, second)
    )
    return {name: abs(one[name] - two[name]) for name in sorted(one.keys() & two.keys())}


def with_disagreements(
    annotation: Annotation, others: Sequence[Annotation], thresholds: Thresholds = Thresholds()
) -> Annotation:
    """The record with its disagreements with `others`, replacing earlier ones with the same calls."""
    calls = {(other.expert, other.args) for other in others}
    kept = [d for d in annotation.disagreements if (d.expert, d.args) not in calls]
    found = [d for other in others for d in compare(annotation, other, thresholds)]
    return dataclasses.replace(annotation, disagreements=(*kept, *found))


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())
