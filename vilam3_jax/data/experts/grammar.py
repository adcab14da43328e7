"""The grammar in which a model calls experts: `<NAME(arguments)>`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

NAME = "[A-Z][A-Z0-9_]{0,31}"
# The length bound keeps a stray '<A(' from scanning a long text repeatedly.
ARGS = r"[^()<>\n]{0,200}"
_CALL = re.compile(rf"<({NAME})\(({ARGS})\)>")
_JOINER = re.compile(r"[\s,;.&+]*(?:(?:and|then|also|or|plus)\b[\s,;]*)*")
_CLOSING = re.compile(r"[.!]?")
_OUTER = re.compile(r"^[\s'\"]+|[\s'\"]+$")  # blanks and quotes around arguments, ignored


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an expert by the name on its card; `args` is '' for none."""

    expert: str
    args: str = ""

    def __str__(self) -> str:
        return f"<{self.expert}({self.args})>"

    def problem(self) -> str | None:
        """The reason why this call cannot be written, or None."""
        if not re.fullmatch(NAME, self.expert):
            return f"expert name {self.expert!r} must be upper case letters, digits and '_'"
        if not re.fullmatch(ARGS, self.args):
            return f"arguments {self.args!r} cannot be written in a call"
        if _OUTER.search(self.args):
            return f"arguments {self.args!r} must not begin or end with a blank or a quote"
        return None


@dataclasses.dataclass(frozen=True)
class CallingTurn:
    """A parsed turn of the model."""

    calls: tuple[Call, ...]  # calls to be made, in order; empty for an answer
    kept: str  # the text up to the last of `calls` and its closing full stop; the whole text without calls
    cut: str = ""  # the rest, such as a result that the model invented
    dropped: tuple[Call, ...] = ()  # calls in `cut`, which are not made


def joined(parts: Sequence[object]) -> str:
    """Joins texts or calls in a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last


def parse_turn(text: str, most: int | None = None) -> CallingTurn:
    """Parses the calls of one turn; accepts any text.

    Consecutive calls, separated only by punctuation or words like 'and', are made in order, `most` of them if
    given. Any other text after a call is cut, because the expert answers first. Blanks and quotes around
    arguments are dropped.
    """
    found = list(_CALL.finditer(text))
    if not found:
        return CallingTurn((), text)
    made = [found[0]]
    for match in found[1:most]:
        if not _JOINER.fullmatch(text, made[-1].end(), match.start()):
            break
        made.append(match)
    closing = _CLOSING.match(text, made[-1].end())
    assert closing is not None  # it may be empty
    return CallingTurn(
        tuple(map(_call, made)),
        text[: closing.end()],
        text[closing.end() :].strip(),
        tuple(map(_call, found[len(made) :])),
    )


def parse_call(text: str) -> Call | None:
    """The call that a text consists of, with or without its angle brackets; None for any other text."""
    match = _CALL.fullmatch(f"<{text.strip().removeprefix('<').removesuffix('>')}>")
    return None if match is None else _call(match)


def _call(match: re.Match[str]) -> Call:
    return Call(match[1], _OUTER.sub("", match[2]))
