"""Texts that end an answer, which are not part of it."""

from __future__ import annotations

from collections.abc import Sequence


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def certain(text: str, stops: Sequence[str]) -> str:
    """The beginning of an unfinished text that stays, whatever follows: no possible start of a stop text."""
    before = until_stop(text, stops)
    return before[: len(before) - max((_overlap(before, stop) for stop in stops), default=0)]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
