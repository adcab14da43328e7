"""Parsers of answers, anchored at the start: (answer, options) → what was read, or None."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Parser = Callable[[str, Sequence[str]], str | None]

_NUMBER = r"(\d+(?:[.,]\d+)?)"
_UNIT = r"\s*(?:ml|millilit(?:er|re)s?|mm|cm|cc|cm3)?\s*"
_BELOW = re.compile(rf"(?:less than|under|below|up to|<)\s*{_NUMBER}{_UNIT}$")
_ABOVE = re.compile(rf"(?:more than|over|above|at least|>|>=)\s*{_NUMBER}{_UNIT}$")
_BETWEEN = re.compile(rf"(?:between\s+|from\s+)?{_NUMBER}{_UNIT}(?:-|to|and){_UNIT}{_NUMBER}{_UNIT}$")
_SINGLE = re.compile(rf"(?:about\s+|approximately\s+|around\s+)?{_NUMBER}{_UNIT}(?![\w-])")


def normalise(text: str) -> str:
    """Lower case, single spaces, plain dashes, and no punctuation at either end."""
    text = text.lower().replace("–", "-").replace("—", "-").replace("−", "-")
    return " ".join(text.split()).strip(" .,;:!?\"'`")


def parse_yes_no(text: str, options: Sequence[str] = ("yes", "no")) -> str | None:
    """`yes` or `no` if it is the first word; 'Abnormal' does not match 'no'."""
    first = re.match(r"[a-z]+", normalise(text))
    return first.group() if first and first.group() in ("yes", "no") else None


def parse_option(text: str, options: Sequence[str]) -> str | None:
    """The longest option that the answer starts with, as whole words, spelt as in `options`."""
    answer = normalise(text)
    for option in sorted(options, key=lambda option: len(normalise(option)), reverse=True):
        wanted = normalise(option)
        if wanted and re.match(re.escape(wanted) + r"(?![\w-])", answer):
            return option
    return None


def parse_range(option: str) -> tuple[float, float] | None:
    """Reads `less than 50 ml`, `50 to 200 ml` or `more than 200 ml` as [low, high)."""
    text = normalise(option)
    if match := _BETWEEN.match(text):
        low, high = _number(match[1]), _number(match[2])
        return (low, high) if low < high else None
    if match := _BELOW.match(text):
        return 0.0, _number(match[1])
    if match := _ABOVE.match(text):
        return _number(match[1]), float("inf")
    return None


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def parse_number_range(text: str, options: Sequence[str]) -> str | None:
    """An option, by its text, by the same range in other words, or by one number inside its range."""
    if found := parse_option(text, options):
        return found
    ranges = {option: bounds for option in options if (bounds := parse_range(option))}
    if answered := parse_range(text):
        return next((option for option, bounds in ranges.items() if bounds == answered), None)
    number = _SINGLE.match(normalise(text))
    if not number or re.match(r"\s*(?:-|to\b|and\b)", normalise(text)[number.end() :]):
        return None
    value = _number(number[1])
    return next((option for option, (low, high) in ranges.items() if low <= value < high), None)


def parse_list(text: str, options: Sequence[str] = ()) -> str | None:
    """The names of a list, sorted and joined by commas."""
    parts = {normalise(part) for part in re.split(r",|;|\band\b", text)} - {""}
    return ", ".join(sorted(parts)) or None


def parse_subset(text: str, options: Sequence[str]) -> str | None:
    """The options of a list, in the order of `options`, joined by commas; None if it names anything else."""
    listed = parse_list(text)
    wanted = {normalise(option): option for option in options}
    if listed is None or any(part not in wanted for part in listed.split(", ")):
        return None
    named = set(listed.split(", "))
    return ", ".join(option for name, option in wanted.items() if name in named)


def parse_exact(text: str, options: Sequence[str] = ()) -> str | None:
    """The normalised text."""
    return normalise(text) or None


def parse_by_options(text: str, options: Sequence[str]) -> str | None:
    """Chooses the parser by the options alone, never by the right answer.

    {yes, no}: `parse_yes_no`; number ranges only: `parse_number_range`; other options: `parse_option`; no
    options: `parse_list`, which reads a single name as a list of one.
    """
    if not options:
        return parse_list(text)
    if {normalise(option) for option in options} == {"yes", "no"}:
        return parse_yes_no(text)
    if all(parse_range(option) for option in options):
        return parse_number_range(text, options)
    return parse_option(text, options)


PARSERS: dict[str, Parser] = {
    "by_options": parse_by_options,
    "yes_no": parse_yes_no,
    "option": parse_option,
    "number_range": parse_number_range,
    "subset": parse_subset,
    "list": parse_list,
    "exact": parse_exact,
}
