"""F1 of boxes, with counts summed over all items. An unparsed answer has no boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vilam3_jax.evals.metrics.base import AdditiveMetric, Row, register

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)

Box = Mapping[str, Any]


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes [x0, y0, x1, y1] with x0 < x1 and y0 < y1."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height / (areas - width * height)


def matched_ious(parsed: Sequence[Box], gold: Sequence[Box]) -> list[float]:
    """IoUs of pairs of boxes, falling: each time the pair with the largest IoU of those left.

    Pairs do not overlap in boxes, and their labels agree if both have one. Of equal IoUs, the first in both
    lists counts.
    """
    pairs = [
        (-overlap, said, right)
        for said, one in enumerate(parsed)
        for right, other in enumerate(gold)
        if (not one["label"] or not other["label"] or one["label"] == other["label"])
        and (overlap := iou(one["box"], other["box"])) > 0
    ]
    left, right_left, found = set(range(len(parsed))), set(range(len(gold))), []
    for overlap, said, right in sorted(pairs):
        if said in left and right in right_left:
            left.discard(said)
            right_left.discard(right)
            found.append(-overlap)
    return found


def _counts(rows: Sequence[Row]) -> np.ndarray:
    """float64 [n, 1 + thresholds]: boxes of answer and right answer, and pairs with at least each IoU."""
    found = np.zeros((len(rows), 1 + len(THRESHOLDS)))
    for place, row in enumerate(rows):
        parsed, gold = row["parsed"] or [], row["gold"]
        matched = matched_ious(parsed, gold)
        found[place] = (
            len(parsed) + len(gold),
            *(sum(one >= least for one in matched) for least in THRESHOLDS),
        )
    return found


def _f1_at(threshold: float) -> AdditiveMetric:
    place = 1 + THRESHOLDS.index(threshold)
    return AdditiveMetric(
        f"detection_f1_{threshold}", _counts, lambda sums: 2 * sums[..., place] / sums[..., 0]
    )


register(_f1_at(0.5))
register(_f1_at(0.3))
register(AdditiveMetric("detection_f1_mean", _counts, lambda sums: 2 * sums[..., 1:].mean(-1) / sums[..., 0]))
