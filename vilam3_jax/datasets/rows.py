"""Rows of a source's tables as the items of a split, each with an id that no other row has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from vilam3_jax.data.examples import path_problem
from vilam3_jax.datasets.conversations import text_of
from vilam3_jax.datasets.dataset import SkipItem

_LONGEST_ID = 200
_LONGEST_PATH = 1024


class Row(NamedTuple):
    """One row of a table.

    Attributes:
      file: the table's path below the root.
      number: of the row, from 1; the header is not counted. In JSON lines, of the line.
      id: of the example that it becomes.
      values: what the table holds: an object or a list of JSON, or a dict of a CSV file's cells.
    """

    file: str
    number: int
    id: str
    values: Any


def rows_of(
    file: str,
    values: Iterable[tuple[int, Any]],
    id_of: Callable[[Any], object],
    *,
    prefix: str = "",
    taken: set[str] | None = None,
) -> list[Row]:
    """Names the rows of a table.

    The id is the source's own where it is a printable text or a whole number. A row without one is
    `row-{number}`, and the second row of one id is `{id}/2`.

    Args:
      file: the table's path.
      values: (number, values) of each row.
      id_of: the source's id of a row; whatever it raises on malformed values means "none".
      prefix: of all ids, such as the split's name.
      taken: ids of other tables of the dataset; grows by those given here.
    """
    taken = set() if taken is None else taken
    rows = []
    for number, row in values:
        name = f"{prefix}/{_source_id(row, id_of) or f'row-{number}'}".lstrip("/")
        unique, repeat = name, 1
        while unique in taken:
            repeat += 1
            unique = f"{name}/{repeat}"
        taken.add(unique)
        rows.append(Row(file, number, unique, row))
    return rows


def name_of(row: Row) -> str:
    """Names a row in messages by its place."""
    return f"{row.file} row {row.number}"


def fields(row: Row) -> dict[str, Any]:
    """The values of a row that is an object.

    Raises:
      SkipItem: it is none.
    """
    if isinstance(row.values, ValueError):
        raise SkipItem(f"the line {row.values}")
    if not isinstance(row.values, dict):
        raise SkipItem(f"the row is a {type(row.values).__name__}, not an object")
    return row.values


def word(values: Mapping[str, Any], key: str) -> str:
    """A text that an example can do without; "" where it is missing or no text."""
    try:
        return text_of(values.get(key), key).strip()
    except SkipItem:
        return ""


def below(folder: str, name: object) -> str:
    """The path of a file that a row names inside `folder`.

    Raises:
      SkipItem: the name is no text, too long, or leads out of the folder.
    """
    path = text_of(name, "image name").strip()
    if len(path) > _LONGEST_PATH:
        raise SkipItem(f"the image name has {len(path)} characters")
    if reason := path_problem(path):
        raise SkipItem(f"image {reason}")
    return f"{folder}/{path}" if folder else path


def _source_id(row: Any, id_of: Callable[[Any], object]) -> str:
    try:
        found = id_of(row)
    except (TypeError, LookupError, AttributeError):
        return ""
    if isinstance(found, bool) or not isinstance(found, str | int):
        return ""
    name = str(found).strip()
    return name if name.isprintable() and len(name) <= _LONGEST_ID else ""
