"""Sections of a configuration: frozen dataclasses that validate themselves.

Each section is defined beside the code that reads it. `from_mapping` builds one from a recipe's ConfigDict or
from JSON; errors name the key as it is written on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform

from vilam3_jax.errors import UserError

AnySection = TypeVar("AnySection", bound="Section")
_SCALARS = {int: (int,), float: (float, int), str: (str,), bool: (bool,)}


def setting(
    *,
    default: Any = dataclasses.MISSING,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: Sequence[Any] = (),
) -> Any:
    """A field of a section with inclusive bounds or a list of allowed values."""
    metadata = {"at_least": at_least, "at_most": at_most, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, field_specifiers=(setting, dataclasses.field))
class Section:
    """Base of all sections; a subclass is a frozen dataclass that sets `key`.

    Attributes:
      key: dotted prefix of the section's keys; empty at the root.
    """

    key: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Checks types, bounds and choices, then `validate`."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            self._check(field)
        self.validate()

    def validate(self) -> None:
        """Checks relations between fields; a subclass raises UserError."""

    def _check(self, field: dataclasses.Field[Any]) -> None:
        value, expected = getattr(self, field.name), _hints(type(self))[field.name]
        if expected in _SCALARS and (
            not isinstance(value, _SCALARS[expected]) or (isinstance(value, bool) and expected is not bool)
        ):
            raise self.error(field.name, f"must be of type {expected.__name__}")
        metadata = field.metadata
        least, most = metadata.get("at_least"), metadata.get("at_most")
        if (least is not None and not value >= least) or (most is not None and not value <= most):
            bound = f"at least {least}" if most is None else f"from {least} to {most}"
            raise self.error(field.name, f"must be {bound}")
        if metadata.get("choices") and value not in metadata["choices"]:
            raise self.error(field.name, f"must be {' or '.join(map(repr, metadata['choices']))}")

    def error(self, name: str, problem: str) -> UserError:
        """The error of one field: `config KEY=VALUE: PROBLEM`."""
        return UserError(f"config {self.key_of(name)}={getattr(self, name)!r}: {problem}")

    @classmethod
    def key_of(cls, name: str) -> str:
        """The dotted key of a field."""
        return f"{cls.key}.{name}" if cls.key else name

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or `default`, as `dict.get`."""
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of the section, for JSON and ml_collections."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]

    def replace(self: AnySection, changes: Mapping[str, Any] | None = None, **fields: Any) -> AnySection:
        """A copy with some fields changed, by name or by dotted key; validated again."""
        values = self.to_dict()
        for dotted, value in {**(changes or {}), **fields}.items():
            *parents, name = dotted.split(".")
            inner = values
            for parent in parents:
                inner = inner[parent]
            if name not in inner:
                raise UserError(
                    f"config key {self.key_of(dotted)}: unknown{suggestion(dotted, flatten(values))}"
                )
            inner[name] = _plain(value)
        return from_mapping(type(self), values)


def from_mapping(
    section: type[AnySection], values: Mapping[str, Any], renamed: Mapping[str, str] | None = None
) -> AnySection:
    """Builds a section and its subsections from nested mappings; lists become tuples.

    Args:
      section: class of the section.
      values: field name → value; absent fields take their defaults.
      renamed: removed dotted key → its new name.

    Raises:
      UserError: an unknown, renamed or missing key, or a value that the section refuses.
    """
    hints = _hints(section)
    for name in values:
        if name not in hints:
            key = section.key_of(name)
            if renamed and key in renamed:
                raise UserError(f"config key {key} is now {renamed[key]}; rename it")
            raise UserError(f"config key {key}: unknown{suggestion(name, hints)}")
    fields = {field.name: field for field in dataclasses.fields(section)}  # pyright: ignore[reportArgumentType]
    missing = [
        section.key_of(name)
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"config: {', '.join(missing)} missing")
    return section(**{name: _field_value(hints[name], value, renamed) for name, value in values.items()})


def _field_value(hint: Any, value: Any, renamed: Mapping[str, str] | None) -> Any:
    inner = next((t for t in _alternatives(hint) if isinstance(t, type) and issubclass(t, Section)), None)
    if inner is not None and isinstance(value, Mapping | Iterable) and not isinstance(value, Section | str):
        return from_mapping(inner, dict(value.items()), renamed)  # pyright: ignore[reportAttributeAccessIssue]
    if float in _alternatives(hint) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _frozen(value)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _hints(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}  # pyright: ignore[reportArgumentType]


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if hasattr(value, "items") and not isinstance(value, Section):
        return {key: _frozen(inner) for key, inner in value.items()}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def describe(section: Section) -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted key, value, help) of all settings; the help is the attribute's line in the docstring."""
    texts = _attribute_texts(type(section))
    for field in dataclasses.fields(section):  # pyright: ignore[reportArgumentType]
        value = getattr(section, field.name)
        if isinstance(value, Section):
            yield from describe(value)
        else:
            yield section.key_of(field.name), value, texts.get(field.name, "")


def _attribute_texts(section: type) -> dict[str, str]:
    """Attribute → its text in the `Attributes:` of the docstrings of a class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        _, _, listed = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        entry = ""
        for line in [*listed.splitlines(), ""]:
            if not line.startswith("    ") or not line:  # a new entry, or the end
                names, _, text = entry.partition(": ")
                texts |= {name.strip(): text for name in names.split(",")}
                entry = line.strip()
            else:
                entry += f" {line.strip()}"
    return texts


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → leaf value of nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if hasattr(value, "items"):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def suggestion(key: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` with the closest known name; empty if none is close."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
