"""Tables of (regular expression → setting) over parameter paths.

Freezing, learning rates and sharding are such tables. The first matching row wins. Every parameter must match
and every row must be used, so a renamed parameter is never missed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vilam3_jax.errors import UserError


def resolve(
    table: Sequence[tuple[str, Any]], paths: Iterable[str], name: str, *, optional: Collection[str] = ()
) -> dict[str, Any]:
    """Looks up every path in `table` by full match.

    Args:
      table: rows of (regex, setting).
      paths: parameter paths.
      name: config key of the table, for messages.
      optional: regular expressions of rows that may match nothing, those that models share.

    Raises:
      UserError: a path without a row, or a row without a path (lists them), or a malformed row.
    """
    rows = [_row(row, name) for row in table]
    used: set[int] = set()
    settings: dict[str, Any] = {}
    unmatched = []
    for path in paths:
        for index, (pattern, setting) in enumerate(rows):
            if pattern.fullmatch(path):
                settings[path] = setting
                used.add(index)
                break
        else:
            unmatched.append(path)
    if unmatched:
        raise UserError(f"config {name}: no row matches {', '.join(sorted(unmatched))}; add one")
    unused = [pattern.pattern for index, (pattern, _) in enumerate(rows) if index not in used]
    unused = [pattern for pattern in unused if pattern not in optional]
    if unused:
        raise UserError(
            f"config {name}: no parameter matches the row(s) {', '.join(unused)}; remove or correct them"
        )
    return settings


def _row(row: Any, name: str) -> tuple[re.Pattern[str], Any]:
    if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
        raise UserError(
            f"config {name}: {row!r} is not a row (regular expression, setting); a comma may be missing"
        )
    try:
        return re.compile(row[0]), row[1]
    except re.error as error:
        raise UserError(f"config {name}: {row[0]!r} is not a regular expression: {error}") from error
