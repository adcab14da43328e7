"""Type checks of examples, whose fields may have any value.

Reasons name positions, fields and types, never values: a value may be report text.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vilam3_jax.data.examples import Example

MAX_TEXT = 1 << 20  # characters of one text
MAX_ITEMS = 10_000  # images, turns or requests of one record
_MAX_ID = 1024
_MAX_NESTING = 32  # of `meta`


def type_problem(example: Example) -> str | None:
    """Returns why a value of an example has an invalid type, or None."""
    if not isinstance(example.id, str) or not example.id:
        return "has no id"
    if reason := _text_problem(example.id, _MAX_ID):
        return f"id {reason}"
    if not isinstance(example.format, str):
        return f"format is {kind_of(example.format)}, not text"
    for field in ("images", "turns", "expert_requests"):
        if reason := _list_problem(field, getattr(example, field)):
            return reason
    if not isinstance(example.meta, dict):
        return f"meta is {kind_of(example.meta)}, not a dict"
    return _plain_problem(example.meta, "meta", 0) or _meta_problem(example.meta)


def kind_of(value: Any) -> str:
    """Returns the type of a value for messages: 'null', 'a list'."""
    if value is None:
        return "null"
    name = type(value).__name__[:40]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def is_text(value: Any) -> bool:
    """Whether a value is text of valid Unicode that is not too long."""
    # Called for every value of every record; most are short ASCII.
    if type(value) is str and value.isascii() and len(value) <= MAX_TEXT:
        return True
    return isinstance(value, str) and _text_problem(value, MAX_TEXT) is None


def is_int(value: Any) -> bool:
    """Whether a value is a 64-bit integer and not a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return False
    return -(2**63) <= int(value) < 2**63


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _text_problem(value: str, max_length: int) -> str | None:
    if len(value) > max_length:
        return f"has {len(value)} characters; the limit is {max_length}"
    if value.isascii():  # a constant-time check
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return None


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # field -> expected type, check; others are text
    "data": ("bytes", lambda value: isinstance(value, bytes)),
    "axis": ("an integer", is_int),
    "index": ("an integer", is_int),
    "window": (
        "two finite numbers (centre, width)",
        lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(_is_finite, value)),
    ),
    "supervised": ("true or false", lambda value: isinstance(value, bool)),
    "before_turn": ("an integer", is_int),
    "image": ("an integer", is_int),
}
_KINDS = {  # field -> type of its entries, their name
    "images": ("ImageRef", "image"),
    "turns": ("Turn", "turn"),
    "expert_requests": ("ExpertRequest", "request"),
    "inputs": ("RequestImage", "input"),
}


def _list_problem(field: str, values: Any) -> str | None:
    kind, name = _KINDS[field]
    if not isinstance(values, tuple):
        return f"{field} is {kind_of(values)}, not a list"
    if len(values) > MAX_ITEMS:
        return f"{field} has {len(values)} entries; the limit is {MAX_ITEMS}"
    for index, value in enumerate(values):
        if type(value).__name__ != kind or not dataclasses.is_dataclass(value):
            return f"{field} {index} is {kind_of(value)}, not {kind}"
        if reason := _part_problem(value, optional=kind == "ImageRef"):
            return f"{name} {index} {reason}"
    return None


def _part_problem(part: Any, optional: bool) -> str | None:
    for field, value in vars(part).items():
        expected, is_valid = _CHECKS.get(field, ("text", is_text))
        if field == "images":
            if reason := _list_problem("inputs", value):
                return reason
        elif not is_valid(value) and not (optional and value is None):
            if expected == "text" and isinstance(value, str):
                return f"{field} {_text_problem(value, MAX_TEXT)}"
            return f"{field} is {kind_of(value)}, not {expected}"
    return None


def _plain_problem(value: Any, place: str, depth: int) -> str | None:
    """Returns why a value of `meta` is not a JSON value, or None."""
    if value is None or isinstance(value, bool) or is_text(value):
        return None
    if isinstance(value, str):
        return f"{place} contains text that {_text_problem(value, MAX_TEXT)}"
    if isinstance(value, int | float):
        return None if _is_finite(value) else f"{place} contains a number that is not finite"
    if depth == _MAX_NESTING:
        return f"{place} is nested more than {_MAX_NESTING} levels deep"
    if isinstance(value, dict):
        for key in value:
            if not is_text(key):
                return f"{place} has a key that is {kind_of(key)}, not text"
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            if not is_text(item) and (reason := _plain_problem(item, place, depth + 1)):
                return reason
        return None
    return f"{place} contains {kind_of(value)}, not text, numbers, booleans, lists or dicts"


def _meta_problem(meta: dict[str, Any]) -> str | None:
    """Checks the entries that loading and evaluation read."""
    keys = meta.get("input_key")
    keys = keys if isinstance(keys, list | tuple) or keys is None else (keys,)
    if not all(isinstance(key, str) for key in keys or ()):
        return "meta.input_key is neither text nor a list of texts"
    for name in ("question_types", "qa", "roles"):
        if meta.get(name) is not None and not isinstance(meta[name], list | tuple):
            return f"meta.{name} is {kind_of(meta[name])}, not a list"
    if not all(isinstance(question, dict) for question in meta.get("qa") or ()):
        return "meta.qa contains entries that are not dicts"
    return None
