"""Wording of messages."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[object], limit: int) -> str:
    """The first `limit` names, separated by commas.

    >>> listed("abc", 2)
    'a, b, ...'
    """
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")
