"""Boxes in pixels, as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_MAX_TEXT = 100_000
_MAX_BOXES = 1_000
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_LABELS, _BOXES = ("label", "name", "class"), ("box", "bbox", "bbox_2d")

Box = dict[str, Any]


def parse_boxes(text: str, options: Sequence[str] = (), **spec: Any) -> list[Box] | None:
    """Boxes [{"label": text or "", "box": [x0, y0, x1, y1]}] in pixels, with x0 < x1 and y0 < y1, sorted.

    Reads JSON, with or without a Markdown fence: one box `[x0, y0, x1, y1]`, a list of boxes, an object label
    → box or list of boxes, or a list of objects with `label` and `box` (or `bbox`, `bbox_2d`). `[]`, `{}` and
    'none' are no boxes.

    None for anything else, for more than 100,000 characters or 1,000 boxes, and for numbers that are not
    finite.
    """
    if len(text) > _MAX_TEXT:
        return None
    fenced = _FENCE.fullmatch(text)
    content = (fenced[1] if fenced else text).strip()
    if content.lower().strip(".") == "none":
        return []
    try:
        value = json.loads(content)
        found = []
        for one in _boxes(value):
            found.append(one)
            if len(found) > _MAX_BOXES:
                return None
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return sorted(found, key=lambda one: (one["label"], one["box"]))


def _boxes(value: Any) -> Iterator[Box]:
    """The boxes of a JSON value.

    Raises:
      ValueError, TypeError, OverflowError: it holds something else.
    """
    if isinstance(value, dict):
        if any(key in value for key in _BOXES):
            yield _labelled(value)
        else:
            for label, boxes in value.items():
                yield from (_box(label, box) for box in _listed(boxes))
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        yield from map(_labelled, value)
    else:
        yield from (_box("", box) for box in _listed(value))


def _labelled(value: dict[str, Any]) -> Box:
    label = next((value[key] for key in _LABELS if key in value), "")
    return _box(label, next(value[key] for key in _BOXES if key in value))


def _listed(boxes: Any) -> Iterable[Any]:
    if not isinstance(boxes, list):
        raise TypeError("not a list")
    return boxes if not boxes or isinstance(boxes[0], list) else [boxes]


def _box(label: Any, corners: Any) -> Box:
    if not isinstance(label, str) or not isinstance(corners, list) or len(corners) != 4:
        raise TypeError("neither a label nor four corners")
    if any(isinstance(corner, bool) or not isinstance(corner, int | float) for corner in corners):
        raise TypeError("a corner is not a number")
    x0, y0, x1, y1 = map(float, corners)
    if not (all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1):
        raise ValueError("not a box")
    return {"label": " ".join(label.lower().split()), "box": [x0, y0, x1, y1]}
