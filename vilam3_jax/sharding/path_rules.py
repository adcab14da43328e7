"""Tables of (regular expression → setting) over parameter paths, for freezing, learning rates and sharding.

Every parameter must match a row, and every row a parameter (except optional ones of a model's own rules), so
renaming a parameter is an error and not a silent change of its setting.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vilam3_jax.errors import UserError


def resolve(
    table: Sequence[tuple[str, Any]], paths: Iterable[str], name: str, *, optional: Collection[str] = ()
) -> dict[str, Any]:
    """Returns path → setting of the first row of `table` whose regular expression matches the whole path.

    Args:
      table: rows of (regular expression, setting).
      paths: parameter paths.
      name: config key of the table, for messages.
      optional: regular expressions of rows that may match no path.

    Raises:
      UserError: a path without a row, a row without a path, or a malformed row.
    """
    rows = [_row(row, name) for row in table]
    matches = {path: next((row for row in rows if row[0].fullmatch(path)), None) for path in paths}
    if unmatched := [path for path, row in matches.items() if row is None]:
        raise UserError(f"config {name}: no row matches {', '.join(sorted(unmatched))}; add one")
    found = {path: row for path, row in matches.items() if row is not None}
    used = {id(row) for row in found.values()}
    unused = [row[0].pattern for row in rows if id(row) not in used and row[0].pattern not in optional]
    if unused:
        raise UserError(
            f"config {name}: no parameter matches the row(s) {', '.join(unused)}; remove or correct them"
        )
    return {path: setting for path, (_, setting) in found.items()}


def _row(row: Any, name: str) -> tuple[re.Pattern[str], Any]:
    if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
        raise UserError(
            f"config {name}: {row!r} is not a row (regular expression, setting); a comma may be missing"
        )
    try:
        return re.compile(row[0]), row[1]
    except re.error as error:
        raise UserError(f"config {name}: {row[0]!r} is not a regular expression: {error}") from error
