"""Reading of request bodies: every field is checked, and every error names the field and the fix."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

from vilam3_jax.serving.errors import ApiError, bad_request

_MAX_NESTING = 64
_SHOWN = 40  # characters of a value in a message


def parse_json(data: bytes) -> Fields:
    """Reads a JSON object.

    Raises:
      ApiError: not JSON, not an object, nested too deeply, or NaN, infinite numbers or lone surrogates in it.
    """

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        value = json.loads(data, parse_constant=no_constant)
    except RecursionError:
        raise bad_request(f"the body is nested deeper than {_MAX_NESTING} levels; flatten it") from None
    except ValueError:  # the message may quote the body
        raise bad_request(
            "the body is not valid JSON; send one JSON object in UTF-8", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    _check(value, _MAX_NESTING)
    return Fields(value)


def _check(value: Any, depth: int) -> None:
    """Checks nesting, numbers and texts of a JSON value."""
    if depth == 0:
        raise bad_request(f"the body is nested deeper than {_MAX_NESTING} levels; flatten it")
    if isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth)
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise bad_request("the body holds a number that is too large", code="invalid_json")
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise bad_request("the body holds half of a surrogate pair; send valid Unicode") from None


class Fields:
    """A JSON object whose fields are taken one by one; `finish` refuses those that are left."""

    def __init__(self, values: dict[str, Any], path: str = ""):
        """`path` is the location of the object in the request body, for error messages."""
        self._values, self._path = values, path
        self._known: set[str] = set()

    def name(self, key: str) -> str:
        """Path of a field."""
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Whether a field is there and not null."""
        return self._values.get(key) is not None

    def take(self, key: str) -> Any:
        """The value of a field of any type; None if absent."""
        self._known.add(key)
        return self._values.get(key)

    def take_all(self) -> dict[str, Any]:
        """All fields."""
        self._known.update(self._values)
        return self._values

    def error(self, key: str, problem: str) -> ApiError:
        """The error of a field: `FIELD: PROBLEM`."""
        return bad_request(f"{self.name(key)}: {problem}", self.name(key))

    def text(self, key: str, default: str | None = None, *, limit: int | None = None) -> str:
        """A string; required without a default."""
        value = self.take(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string{_but(value)}")
        if limit is not None and len(value) > limit:
            raise self.error(key, f"has {len(value)} characters, more than {limit}")
        return value

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of a few strings."""
        value = self.text(key, default)
        if value not in choices:
            raise self.error(key, f"must be {' or '.join(choices)}{_but(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false{_but(value)}")
        return value

    def integer(self, key: str, low: int, high: int) -> int | None:
        """An integer in a range; None if absent."""
        value = self.take(key)
        if value is None:
            return None
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, int) or whole) or not low <= value <= high:
            raise self.error(key, f"must be an integer from {low} to {high}{_but(value)}")
        return int(value)

    def number(self, key: str, low: float, high: float) -> float | None:
        """A number in a range; None if absent."""
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(key, f"must be a number from {low:g} to {high:g}{_but(value)}")
        return float(value)

    def object(self, key: str) -> Fields | None:
        """An object; None if absent."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object{_but(value)}")
        return Fields(value, self.name(key))

    def objects(self, key: str, *, limit: int) -> list[Fields]:
        """A list of objects, not empty."""
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, f"must be a list of one or more objects{_but(value)}")
        if len(value) > limit:
            raise self.error(key, f"has {len(value)} entries, more than {limit}")
        return list(self._items(key, value))

    def _items(self, key: str, values: list[Any]) -> Iterator[Fields]:
        for place, item in enumerate(values):
            if not isinstance(item, dict):
                raise self.error(f"{key}[{place}]", f"must be an object{_but(item)}")
            yield Fields(item, f"{self.name(key)}[{place}]")

    def only(self, key: str, neutral: Collection[Any], why: str) -> None:
        """Refuses a field of OpenAI's interface unless its value asks for nothing."""
        value = self.take(key)
        if value is None or (value in ({}, []) and not neutral):
            return
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            return
        raise ApiError(400, f"{self.name(key)}: {why}; leave it out", "unsupported", param=self.name(key))

    def ignore(self, *keys: str) -> None:
        """Fields that change nothing here, such as labels of the client."""
        self._known.update(keys)

    def finish(self) -> None:
        """Refuses unknown fields."""
        for key in self._values:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1)
                hint = f"; did you mean {near[0]}?" if near else "; leave it out"
                shown = self.name(key if len(key) <= _SHOWN else key[:_SHOWN] + "…")
                raise ApiError(400, f"{shown}: unknown field{hint}", "unknown_field", param=shown)


def _but(value: Any) -> str:
    """`, not VALUE` in a message; short values only."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", not an object"
    if isinstance(value, list):
        return ", not a list"
    shown = (
        json.dumps(value, ensure_ascii=False)
        if not isinstance(value, int) or abs(value) < 1e18
        else "a huge number"
    )
    return f", not {shown}" if len(shown) <= _SHOWN else ""
