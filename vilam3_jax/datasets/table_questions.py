"""Questions about the columns of a table: what kind of label each one holds, and how it is asked about."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vilam3_jax.datasets.dataset import SkipItem
from vilam3_jax.errors import UserError

KINDS = ("yes_no", "choice", "number", "text")
YES_NO = ("yes", "no")
ONE_HOT = "one_hot"
MOST_OPTIONS = 20
_FEW_OPTIONS = 5  # more must occur twice on average, or they are no classes
_LONGEST_OPTION = 60
_LONGEST_CELL = 64 << 10
_YES = frozenset(("1", "yes", "y", "true", "positive", "present"))
_NO = frozenset(("0", "no", "n", "false", "negative", "absent"))
_EMPTY = frozenset(("", "nan", "na", "n/a", "null", "<na>"))
_KEYS = {"name", "kind", "ask", "answers", "unit"}
_PLACE = re.compile(r"\{(\w*)\}")
_ODD_SHARE = 100  # of so many cells, one may be odd without changing the kind of the column
_FEW = 4  # from so many cells on, a single odd one is taken for a slip

# The first wording is the canonical one: evaluation asks with it.
DEFAULT_ASK: Mapping[str, tuple[str, ...]] = {
    "yes_no": (
        "Does {this} show {name}? Answer yes or no.",
        "Is there {name} in {this}? Answer yes or no.",
        "Can you see {name} here? Answer yes or no.",
    ),
    "choice": (
        "What is the {name} in {this}? Options: {options}.",
        "Which {name} fits {this}? Options: {options}.",
    ),
    "number": ("What is the {name} in {this}? Answer with a number{unit}.",),
    "text": ("What is the {name} in {this}?", "State the {name} in {this}."),
    ONE_HOT: (
        "Which of these does {this} show? Options: {options}.",
        "What does {this} show? Options: {options}.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """How a column is asked about.

    Attributes:
      column: its header; the question's type.
      name: what it is called in questions.
      kind: of `KINDS`.
      ask: wordings with {name}, {options}, {unit} and {this}; the first is the canonical one.
      options: the possible answers, empty for numbers and texts.
      answers: cell without case → answer; None for a cell that is not asked about. Other cells are read by
        the kind.
      unit: of numbers, "" for none.
    """

    column: str
    name: str
    kind: str
    ask: tuple[str, ...]
    options: tuple[str, ...] = ()
    answers: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    unit: str = ""

    def answer(self, cell: str) -> str | None:
        """The answer that a cell gives; None if it is empty or not asked about.

        Raises:
          SkipItem: the cell is none of what the column may hold.
        """
        key = cell.casefold()
        if key in self.answers:
            return self.answers[key]
        if key in _EMPTY:
            return None
        if self.kind == "choice":
            found = next((option for option in self.options if option.casefold() == key), None)
            if found is None:
                raise SkipItem(f"the label {self.column} has a value that is none of its options")
            return found
        if self.kind == "yes_no":
            return YES_NO[0] if _said(key, self.column) else YES_NO[1]
        if self.kind == "number" and _number(cell) is None:
            raise SkipItem(f"the label {self.column} is no number")
        return cell

    def question(self, rng: random.Random | None, images: int = 1) -> str:
        """The question, in words of `rng`; in the canonical ones without it."""
        wording = self.ask[0] if rng is None else rng.choice(self.ask)
        unit = f", in {self.unit}" if self.unit else ""
        words = {"name": self.name, "options": ", ".join(self.options), "unit": unit}
        words["this"] = "this image" if images == 1 else "these images"
        return _PLACE.sub(lambda place: words[place[1]], wording)


def cell_text(value: object, column: str) -> str:
    """A cell as text: "" if it is empty; whole numbers without a decimal point.

    Raises:
      SkipItem: it is a list, an object or bytes, or far too long for a label.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | tuple | dict | set | bytes):
        raise SkipItem(f"the label {column} is a {type(value).__name__}, not a value")
    text = str(value).replace("\0", "").strip()
    if len(text) > _LONGEST_CELL:
        raise SkipItem(f"the label {column} has {len(text)} characters; up to {_LONGEST_CELL} are read")
    number = re.fullmatch(r"([+-]?\d+)\.0+", text)
    return number[1] if number else text


def read_templates(content: Any, labels: Sequence[str], path: str) -> dict[str, dict[str, Any]]:
    """Checks a file of questions.

    Args:
      content: of the JSON: `{"columns": {COLUMN: {"name", "kind", "ask", "answers", "unit"}}}`, all optional;
        with one-hot labels, `{"one_hot": {"ask"}}` too.
      labels: the columns that are asked about.
      path: of the file, for messages.

    Returns:
      Column → its settings; `ONE_HOT` → those of one-hot labels.

    Raises:
      UserError: names the first entry that is not as documented.
    """
    if not isinstance(content, dict) or set(content) - {"columns", ONE_HOT}:
        raise UserError(f'{path}: is no object of "columns" and "one_hot"')
    columns = content.get("columns", {})
    if not isinstance(columns, dict):
        raise UserError(f'{path}: "columns" is no object of columns')
    known = {label.casefold(): label for label in labels}
    out = {}
    for column, settings in columns.items():
        if column.strip().casefold() not in known:
            raise UserError(f"{path}: column {column!r} is none of --label {' '.join(labels)}")
        out[known[column.strip().casefold()]] = _checked(settings, f"{path}: column {column!r}", _KEYS)
    if ONE_HOT in content:
        out[ONE_HOT] = _checked(content[ONE_HOT], f"{path}: one_hot", {"ask"})
    return out


def asked_of(column: str, cells: Mapping[str, int], settings: Mapping[str, Any]) -> Asked:
    """How a column is asked about: as its settings say, and otherwise as its cells suggest.

    Args:
      column: its header.
      cells: text → how often it occurs.
      settings: of `read_templates`.
    """
    answers = {cell_text(k, column).casefold(): v for k, v in settings.get("answers", {}).items()}
    unasked = _EMPTY | {cell for cell, answer in answers.items() if answer is None}
    filled = {text: count for text, count in cells.items() if text.casefold() not in unasked}
    spoken = [answer for answer in dict.fromkeys(answers.values()) if answer is not None]
    kind = settings.get("kind") or _kind_of_answers(spoken) or _kind(filled)
    options: tuple[str, ...] = ()
    if kind == "yes_no":
        options = YES_NO
    elif kind == "choice":
        options = tuple(spoken or _ordered(_spellings(filled)))
    ask = tuple(settings.get("ask", ())) or DEFAULT_ASK[kind]
    name = settings.get("name") or readable(column)
    return Asked(column, name, kind, ask, options, answers, settings.get("unit", ""))


def one_hot(columns: Sequence[str], settings: Mapping[str, Any]) -> Asked:
    """How one-hot columns, of which each row marks one, are asked about."""
    ask = tuple(settings.get("ask", ())) or DEFAULT_ASK[ONE_HOT]
    return Asked(ONE_HOT, "", "choice", ask, tuple(readable(column) for column in columns))


def marked(columns: Sequence[str], cells: Sequence[str]) -> str | None:
    """The class that one-hot cells mark; None if all are empty.

    Raises:
      SkipItem: a cell is neither yes nor no, or not exactly one is marked.
    """
    said = [
        _said(cell.casefold(), column)
        for column, cell in zip(columns, cells, strict=True)
        if cell.casefold() not in _EMPTY
    ]
    if not said:
        return None
    if len(said) < len(columns) or sum(said) != 1:
        raise SkipItem(f"marks {sum(said)} of the one-hot labels ({len(said)} of {len(columns)} are filled)")
    return readable(columns[said.index(True)])


def readable(column: str) -> str:
    """A header as words.

    >>> readable("Pleural_Effusion"), readable("BI-RADS"), readable("tumor.grade")
    ('pleural effusion', 'BI-RADS', 'tumor grade')
    """
    words = re.sub(r"[_.\s]+", " ", column).split()
    return " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words)


def _checked(settings: Any, where: str, keys: Iterable[str]) -> dict[str, Any]:
    if not isinstance(settings, dict) or set(settings) - set(keys):
        raise UserError(f"{where}: is no object of {', '.join(sorted(keys))}")
    if settings.get("kind", KINDS[0]) not in KINDS:
        raise UserError(f"{where}: kind {settings['kind']!r} is none of {', '.join(KINDS)}")
    for key in ("name", "unit"):
        if not isinstance(settings.get(key, ""), str):
            raise UserError(f"{where}: {key} is no text")
    ask = settings.get("ask", [])
    if not isinstance(ask, list) or not all(isinstance(text, str) and text.strip() for text in ask):
        raise UserError(f"{where}: ask is no list of texts")
    for place in (place for text in ask for place in _PLACE.findall(text)):
        if place not in ("name", "options", "unit", "this"):
            raise UserError(f"{where}: {{{place}}} is none of {{name}}, {{options}}, {{unit}}, {{this}}")
    answers = settings.get("answers", {})
    if not isinstance(answers, dict) or not all(
        answer is None or (isinstance(answer, str) and answer.strip()) for answer in answers.values()
    ):
        raise UserError(f"{where}: answers is no object of a text or null for each cell")
    spoken = {answer for answer in answers.values() if answer is not None}
    if settings.get("kind") == "yes_no" and not spoken <= set(YES_NO):
        raise UserError(f"{where}: of kind yes_no, so answers are yes, no or null")
    return settings


def _kind_of_answers(spoken: Sequence[str]) -> str | None:
    if not spoken:
        return None
    return "yes_no" if set(spoken) <= set(YES_NO) else "choice"


def _kind(cells: Mapping[str, int]) -> str:
    """The kind that cells suggest. Few odd cells do not change it; they are skipped with their rows."""
    total = sum(cells.values())
    binary = {text for text in cells if text.casefold() in _YES | _NO}
    numbers = {text for text in cells if _number(text) is not None}
    if binary and _slips(cells, binary, total) and not (numbers - binary):
        return "yes_no"
    few = 2 <= len({text.casefold() for text in cells}) <= min(MOST_OPTIONS, max(_FEW_OPTIONS, total // 2))
    whole = all(float(text).is_integer() for text in numbers)
    if numbers and _slips(cells, numbers, total):
        return "choice" if whole and few and len(numbers) == len(cells) else "number"
    return "choice" if few and max(map(len, cells)) <= _LONGEST_OPTION else "text"


def _slips(cells: Mapping[str, int], fitting: Iterable[str], total: int) -> bool:
    odd = total - sum(cells[text] for text in fitting)
    return odd <= max(total // _ODD_SHARE, 1 if total >= _FEW else 0)


def _spellings(cells: Mapping[str, int]) -> list[str]:
    """The most frequent spelling of each text; case makes no difference."""
    found: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
    for text, count in cells.items():
        found[text.casefold()].append((-count, text))
    return [min(spelt)[1] for spelt in found.values()]


def _ordered(options: Iterable[str]) -> list[str]:
    """Numbers by size, then texts by letter."""
    return sorted(options, key=lambda text: (_number(text) is None, _number(text) or 0.0, text.casefold()))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _said(key: str, column: str) -> bool:
    if key not in _YES | _NO:
        raise SkipItem(f"the label {column} is neither yes nor no")
    return key in _YES
