"""Anchored parsers: an answer is read from its start, and what is ambiguous is not read at all.

A parser takes (text, options, what else the item says of its answer) and returns a JSON value; None if the
answer cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Up to 15 digits, which a float64 holds exactly; thousands in groups of three; a decimal point or comma.
_GROUPED = r"[1-9][0-9]{0,2}(?:,[0-9]{3}){1,4}(?:\.[0-9]{1,15})?"
_NUMBER = rf"((?:{_GROUPED}|[0-9]{{1,15}}(?:[.,][0-9]{{1,15}})?)(?![0-9]|[.,][0-9]))"
_VOLUME = r"ml|millilit(?:er|re)s?|cc|cm3|cm\^3|cm³"
_UNIT = rf"\s*({_VOLUME}|mm|cm)?(?![\w^³])\s*"
_JOIN = r"(?:-|to\b|and\b)\s*"
_BELOW = re.compile(rf"(?:less than|under|below|up to|<)\s*{_NUMBER}{_UNIT}$")
_ABOVE = re.compile(rf"(?:more than|over|above|at least|>=|>)\s*{_NUMBER}{_UNIT}$")
_BETWEEN = re.compile(rf"(?:between\s+|from\s+)?{_NUMBER}{_UNIT}{_JOIN}{_NUMBER}{_UNIT}$")
_SINGLE = re.compile(rf"(?:about\s+|approximately\s+|around\s+)?{_NUMBER}{_UNIT}")
# "No one can say" does not deny anything.
_NOT_A_DENIAL = re.compile(r"no (?:one|idea|comment|way of|way to)\b")
_BOTH = re.compile(r"(?:yes|no)\s*(?:/|or\b|and\b)\s*(?:yes|no)\b")
_DENIED = re.compile(
    r" (?:(?:is|are|was|were|can be|has been|have been|seems|appears) )?"
    r"(?:not|absent|unlikely|excluded|improbable|ruled out)\b"
)
_LETTER = re.compile(
    r"(?:(?:the )?(?:(?:correct|right|best) )?(?:answer|option|choice)(?: is\b:?|:| )\s*)?(.*)", re.DOTALL
)
# Words of one letter that begin sentences.
ONE_LETTER_WORDS = ("a", "i")


def normalise(text: str) -> str:
    """Lower case, single spaces, plain dashes, and no punctuation at either end."""
    text = text.lower().replace("–", "-").replace("—", "-").replace("−", "-")
    return " ".join(text.split()).strip(" .,;:!?\"'`")


def parse_yes_no(text: str, options: Sequence[str] = ("yes", "no"), **spec: Any) -> str | None:
    """`yes` or `no` if it is the first word; 'Abnormal', 'no-one' and 'yes or no' are neither."""
    answer = normalise(text)
    first = re.match(r"(yes|no)(?!['-]?\w)", answer)
    return None if not first or _NOT_A_DENIAL.match(answer) or _BOTH.match(answer) else first[1]


def parse_option(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """The longest option that the answer starts with, as whole words, spelt as in `options`.

    Not read: an option that the next words deny, or an alternative of two options. An option of one letter
    may be in parentheses or follow 'the answer is', and the article 'A' or the pronoun 'I' is no option.
    """
    answer = normalise(text)
    named = {normalise(option): option for option in reversed(options)}
    if any(len(name) == 1 and name.isalpha() for name in named) and (found := read_letter(answer, named)):
        return found[0]
    for name in sorted(named, key=len, reverse=True):
        if not name or not answer.startswith(name):
            continue
        rest = answer[len(name) :]
        if re.match(r"[\w-]", rest) or (name in ONE_LETTER_WORDS and rest[:1] == " "):
            continue
        if _DENIED.match(rest) or _names_another(rest, named):
            return None
        return named[name]
    return None


def read_letter(answer: str, named: Mapping[str, str]) -> tuple[str, str] | None:
    """Reads a letter in parentheses, after 'the answer is', or before a separator.

    Args:
      answer: a normalised text.
      named: letter → what it stands for.

    Returns:
      What the letter stands for, and the text after it; None if there is no such letter, or another one
      follows.
    """
    found = _LETTER.match(answer)
    rest = found[1] if found else answer
    token = re.match(r"\(([^\W\d_])\)|([^\W\d_])(?=$|[.):,;])", rest)
    if not token or (name := token[1] or token[2]) not in named:
        return None
    rest = rest[token.end() :].lstrip(").")
    return None if _names_another(rest, named) else (named[name], rest)


def _names_another(rest: str, named: Mapping[str, str]) -> bool:
    """Whether the text goes on with another option."""
    joined = re.match(r"\s*(?:/|[,;]?\s*(?:or|and)\b|[,;])\s*\(?", rest)
    return bool(joined) and any(
        name and re.match(re.escape(name) + r"(?![\w-])", rest[joined.end() :]) for name in named
    )


def parse_range(option: str) -> tuple[float, float] | None:
    """Reads `less than 50 ml`, `50 to 200 ml` or `more than 200 ml` as [low, high)."""
    found = _range(option)
    return found and found[:2]


def _range(option: str) -> tuple[float, float, str] | None:
    """`parse_range` and the unit, '' if none is given; None if two units differ."""
    text = normalise(option)
    if match := _BETWEEN.match(text):
        low, high = _number(match[1]), _number(match[3])
        units = {_unit(match[2]), _unit(match[4])} - {""}
        return (low, high, "".join(units)) if low < high and len(units) < 2 else None
    if match := _BELOW.match(text):
        return 0.0, _number(match[1]), _unit(match[2])
    if match := _ABOVE.match(text):
        return _number(match[1]), float("inf"), _unit(match[2])
    return None


def _unit(text: str | None) -> str:
    return "ml" if text and text not in ("mm", "cm") else text or ""


def _number(text: str) -> float:
    """A comma before every group of three digits separates thousands, as in 1,200; another is decimal."""
    return float(text.replace(",", "" if re.fullmatch(_GROUPED, text) else "."))


def parse_number_range(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """An option, by its text, by the same range in other words, or by one number inside its range.

    A number without unit has that of the options; a number with another unit, or before another word such as
    'lesions', is not read.
    """
    if found := parse_option(text, options):
        return found
    ranges = {option: bounds for option in options if (bounds := _range(option))}
    units = {unit for _, _, unit in ranges.values()} | {""}
    if answered := _range(text):
        equal = (option for option, (low, high, _) in ranges.items() if (low, high) == answered[:2])
        return next(equal, None) if answered[2] in units else None
    answer = normalise(text)
    number = _SINGLE.match(answer)
    if not number or _unit(number[2]) not in units:
        return None
    rest = answer[number.end() :]
    if re.search("[0-9]", rest) or re.match(_JOIN, rest) or (not number[2] and re.match(r"[^,;.(]", rest)):
        return None
    value = _number(number[1])
    return next((option for option, (low, high, _) in ranges.items() if low <= value < high), None)


def parse_list(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """The names of a list, sorted and joined by commas."""
    parts = {normalise(part) for part in re.split(r",|;|\band\b", text)} - {""}
    return ", ".join(sorted(parts)) or None


def parse_subset(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """The options of a list, in the order of `options`, joined by commas; None if it names anything else."""
    listed = parse_list(text)
    wanted = {normalise(option): option for option in options}
    if listed is None or any(part not in wanted for part in listed.split(", ")):
        return None
    named = set(listed.split(", "))
    return ", ".join(option for name, option in wanted.items() if name in named)


def parse_exact(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """The normalised text."""
    return normalise(text) or None


def parse_by_options(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
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
