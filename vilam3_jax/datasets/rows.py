"""Rows of tables as the items of a split, with unique ids."""

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
      number: number of the row from 1, without the header; in JSON lines, of the line.
      id: id of its example.
      values: a JSON object or list, or a dict of CSV cells.
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
    """Assigns ids to the rows of a table.

    The id is the source's if that is a printable text or an integer, else `row-{number}`. The second row with
    an id gets `{id}/2`.

    Args:
      file, values: the table's path, and (number, values) of each row.
      id_of: returns the source's id; an error on malformed values means "none".
      prefix: prefix of all ids, such as the split's name.
      taken: ids of other tables of the dataset; the new ids are added.
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
    """Name of a row in messages: its file and number."""
    return f"{row.file} row {row.number}"


def fields(row: Row) -> dict[str, Any]:
    """The values of a row with an object.

    Raises:
      SkipItem: it is not an object.
    """
    if isinstance(row.values, ValueError):
        raise SkipItem(f"the line {row.values}")
    if not isinstance(row.values, dict):
        raise SkipItem(f"the row is a {type(row.values).__name__}, not an object")
    return row.values


def word(values: Mapping[str, Any], key: str) -> str:
    """An optional text; "" if it is missing or not a text."""
    try:
        return text_of(values.get(key), key).strip()
    except SkipItem:
        return ""


def below(folder: str, name: object) -> str:
    """The path of a file that a row names in `folder`.

    Raises:
      SkipItem: the name is not a text, is too long, or leads out of the folder.
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
