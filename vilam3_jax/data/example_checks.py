"""Whether the values of an example have the types that its fields state; records may come from anywhere.

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
_PARTS = {"images": "ImageRef", "turns": "Turn", "expert_requests": "ExpertRequest"}
_NAMES = {"images": "image", "turns": "turn", "expert_requests": "request"}


def type_problem(example: Example) -> str | None:
    """Why some value of an example is of no type that can be used, or None."""
    if not isinstance(example.id, str) or not example.id:
        return "has no id"
    if reason := _text(example.id, _MAX_ID):
        return f"id {reason}"
    if not isinstance(example.format, str):
        return f"format is {kind_of(example.format)}, not text"
    for field, part in _PARTS.items():
        if reason := _list(getattr(example, field), part):
            return f"{field} {reason}"
    for field, check in (("images", _image), ("turns", _turn), ("expert_requests", _request)):
        for position, value in enumerate(getattr(example, field)):
            if reason := check(value):
                return f"{_NAMES[field]} {position} {reason}"
    if not isinstance(example.meta, dict):
        return f"meta is {kind_of(example.meta)}, not a dict"
    return _plain(example.meta, "meta", 0) or _meta(example.meta)


def kind_of(value: Any) -> str:
    """The type of a value for people: 'null', 'a list'."""
    if value is None:
        return "null"
    name = type(value).__name__[:40]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be stored: of valid Unicode and not too long."""
    # Every value of every record comes through here, most of them short ASCII.
    if type(value) is str and value.isascii() and len(value) <= MAX_TEXT:
        return True
    return isinstance(value, str) and _text(value, MAX_TEXT) is None


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; a truth value is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return False
    return -(2**63) <= int(value) < 2**63


def _text(value: str, most: int) -> str | None:
    if len(value) > most:
        return f"has {len(value)} characters; at most {most} are read"
    if value.isascii():  # known without looking at the text
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is no valid Unicode"
    return None


def _list(values: Any, part: str) -> str | None:
    if not isinstance(values, tuple):
        return f"is {kind_of(values)}, not a list"
    if len(values) > MAX_ITEMS:
        return f"has {len(values)} entries; at most {MAX_ITEMS} are read"
    for position, value in enumerate(values):
        if type(value).__name__ != part or not dataclasses.is_dataclass(value):
            return f"{position} is {kind_of(value)}, not {part}"
    return None


def _field(value: Any, name: str, wanted: str, fits: Callable[[Any], bool]) -> str | None:
    if fits(value):
        return None
    if wanted == "text" and isinstance(value, str):
        return f"{name} {_text(value, MAX_TEXT)}"
    return f"{name} is {kind_of(value)}, not {wanted}"


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _image(image: Any) -> str | None:
    return (
        _field(image.data, "data", "bytes", _optional(lambda value: isinstance(value, bytes)))
        or _field(image.path, "path", "text", _optional(is_text))
        or _field(image.axis, "axis", "a whole number", _optional(is_int))
        or _field(image.index, "index", "a whole number", _optional(is_int))
        or _field(image.window, "window", "two finite numbers (centre, width)", _optional(_is_window))
        or _field(image.modality, "modality", "text", _optional(is_text))
    )


def _is_window(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_finite, value))


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _turn(turn: Any) -> str | None:
    if is_text(turn.role) and is_text(turn.text) and isinstance(turn.supervised, bool):
        return None
    return (
        _field(turn.role, "role", "text", is_text)
        or _field(turn.text, "text", "text", is_text)
        or _field(turn.supervised, "supervised", "true or false", lambda value: isinstance(value, bool))
    )


def _request(request: Any) -> str | None:
    for name in ("expert", "args", "policy", "question", "call"):
        if reason := _field(getattr(request, name), name, "text", is_text):
            return reason
    if reason := _field(request.before_turn, "before_turn", "a whole number", is_int):
        return reason
    if reason := _list(request.images, "RequestImage"):
        return f"images {reason}"
    for position, image in enumerate(request.images):
        reason = _field(image.image, "number", "a whole number", is_int) or _field(
            image.role, "role", "text", is_text
        )
        if reason:
            return f"image {position} {reason}"
    return None


def _plain(value: Any, place: str, depth: int) -> str | None:
    """Why a value of `meta` is none that JSON has, or None."""
    if value is None or isinstance(value, bool) or is_text(value):
        return None
    if isinstance(value, str):
        return f"{place} holds text that {_text(value, MAX_TEXT)}"
    if isinstance(value, int | float):
        return None if _is_finite(value) else f"{place} holds a number that is not finite"
    if depth == _MAX_NESTING:
        return f"{place} is nested more than {_MAX_NESTING} times"
    if isinstance(value, dict):
        for key in value:
            if not is_text(key):
                return f"{place} has a key that is {kind_of(key)}, not text"
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            if not is_text(item) and (reason := _plain(item, place, depth + 1)):
                return reason
        return None
    return f"{place} holds {kind_of(value)}, not text, numbers, booleans, lists or dicts"


def _meta(meta: dict[str, Any]) -> str | None:
    """The entries that loading and evaluation read."""
    keys = meta.get("input_key")
    if keys is not None and not all(
        isinstance(key, str) for key in (keys if isinstance(keys, list | tuple) else (keys,))
    ):
        return "meta.input_key is neither text nor a list of texts"
    for name in ("question_types", "qa", "roles"):
        if meta.get(name) is not None and not isinstance(meta[name], list | tuple):
            return f"meta.{name} is {kind_of(meta[name])}, not a list"
    if not all(isinstance(question, dict) for question in meta.get("qa") or ()):
        return "meta.qa holds entries that are no dicts"
    return None
