"""Questions about the label columns of a table: column kinds, wordings and answers."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vilam3_jax.datasets.conversations import YES_NO
from vilam3_jax.datasets.dataset import SkipItem
from vilam3_jax.errors import UserError

KINDS = ("yes_no", "choice", "number", "text")
ONE_HOT = "one_hot"
MAX_OPTIONS = 20
_FEW_OPTIONS = 5  # above this number, classes must occur twice on average
_MAX_OPTION = 60
_MAX_CELL = 64 << 10
_YES = frozenset(("1", "yes", "y", "true", "positive", "present"))
_NO = frozenset(("0", "no", "n", "false", "negative", "absent"))
_EMPTY = frozenset(("", "nan", "na", "n/a", "null", "<na>"))
_KEYS = {"name", "kind", "ask", "answers", "unit"}
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_OUTLIER_SHARE = 100  # one cell in this many may not fit the kind of the column
_OUTLIER_CELLS = 4  # from this many cells on, one always may

# The first wording is canonical: evaluation uses it.
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
class LabelColumn:
    """A label column and its question.

    Attributes:
      header: header of the column; also the question type.
      name: used in questions.
      kind: one of `KINDS`.
      ask: wordings with {name}, {options}, {unit} and {this}; the first is canonical.
      options: possible answers; empty for numbers and texts.
      answers: case-folded cell → answer, None to ignore the cell. Other cells are parsed by kind.
      unit: unit of numbers, or "".
    """

    header: str
    name: str
    kind: str
    ask: tuple[str, ...]
    options: tuple[str, ...] = ()
    answers: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    unit: str = ""

    def answer(self, cell: str) -> str | None:
        """Returns the answer for a cell; None if it is empty or ignored.

        Raises:
          SkipItem: the cell is invalid for the column.
        """
        key = cell.casefold()
        if key in self.answers:
            return self.answers[key]
        if key in _EMPTY:
            return None
        if self.kind == "choice":
            found = next((option for option in self.options if option.casefold() == key), None)
            if found is None:
                raise SkipItem(f"the label {self.header} has a value that is not an option")
            return found
        if self.kind == "yes_no":
            return YES_NO[0] if _is_yes(key, self.header) else YES_NO[1]
        if self.kind == "number" and _number(cell) is None:
            raise SkipItem(f"the label {self.header} is not a number")
        return cell

    def question(self, rng: random.Random | None, images: int = 1) -> str:
        """Returns the question in a random wording, or without `rng` in the canonical one."""
        wording = self.ask[0] if rng is None else rng.choice(self.ask)
        unit = f", in {self.unit}" if self.unit else ""
        words = {"name": self.name, "options": ", ".join(self.options), "unit": unit}
        words["this"] = "this image" if images == 1 else "these images"
        return _PLACEHOLDER.sub(lambda match: words[match[1]], wording)


def cell_text(value: object, column: str) -> str:
    """Returns a cell as text: "" if empty, whole numbers without a decimal point.

    Raises:
      SkipItem: it is a list, an object, bytes, or too long for a label.
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
    if len(text) > _MAX_CELL:
        raise SkipItem(f"the label {column} has {len(text)} characters; up to {_MAX_CELL} are read")
    number = re.fullmatch(r"([+-]?\d+)\.0+", text)
    return number[1] if number else text


def read_templates(content: Any, labels: Sequence[str], path: str) -> dict[str, dict[str, Any]]:
    """Validates a question file.

    Args:
      content: parsed JSON: `{"columns": {COLUMN: {"name", "kind", "ask", "answers", "unit"}}, "one_hot":
        {"ask"}}`, everything optional.
      labels: headers of the label columns.
      path: path of the file, for messages.

    Returns:
      Header → settings; `ONE_HOT` → settings of one-hot labels.

    Raises:
      UserError: names the first invalid entry.
    """
    if not isinstance(content, dict) or set(content) - {"columns", ONE_HOT}:
        raise UserError(f'{path}: must be an object of "columns" and "one_hot"')
    columns = content.get("columns", {})
    if not isinstance(columns, dict):
        raise UserError(f'{path}: "columns" must be an object of columns')
    known = {label.casefold(): label for label in labels}
    out = {}
    for column, settings in columns.items():
        if column.strip().casefold() not in known:
            raise UserError(f"{path}: column {column!r} is not one of --label {' '.join(labels)}")
        out[known[column.strip().casefold()]] = _checked(settings, f"{path}: column {column!r}", _KEYS)
    if ONE_HOT in content:
        out[ONE_HOT] = _checked(content[ONE_HOT], f"{path}: one_hot", {"ask"})
    return out


def infer_column(header: str, cells: Mapping[str, int], settings: Mapping[str, Any]) -> LabelColumn:
    """Returns a label column; kind and options are inferred unless set.

    Args:
      header: header of the column.
      cells: text → number of occurrences.
      settings: of `read_templates`.
    """
    answers = {cell_text(k, header).casefold(): v for k, v in settings.get("answers", {}).items()}
    ignored = _EMPTY | {cell for cell, answer in answers.items() if answer is None}
    filled = {text: count for text, count in cells.items() if text.casefold() not in ignored}
    given = [answer for answer in dict.fromkeys(answers.values()) if answer is not None]
    kind = settings.get("kind")
    if kind is None and given:
        kind = "yes_no" if set(given) <= set(YES_NO) else "choice"
    kind = kind or _kind(filled)
    options: tuple[str, ...] = ()
    if kind == "yes_no":
        options = YES_NO
    elif kind == "choice":
        options = tuple(given or _ordered(_spellings(filled)))
    ask = tuple(settings.get("ask", ())) or DEFAULT_ASK[kind]
    name = settings.get("name") or readable(header)
    return LabelColumn(header, name, kind, ask, options, answers, settings.get("unit", ""))


def one_hot_column(headers: Sequence[str], settings: Mapping[str, Any]) -> LabelColumn:
    """Returns one-hot columns as a single choice."""
    ask = tuple(settings.get("ask", ())) or DEFAULT_ASK[ONE_HOT]
    return LabelColumn(ONE_HOT, "", "choice", ask, tuple(map(readable, headers)))


def one_hot_label(headers: Sequence[str], cells: Sequence[str]) -> str | None:
    """Returns the class encoded by one-hot cells; None if all are empty.

    Raises:
      SkipItem: a cell is neither yes nor no, or not exactly one is yes.
    """
    flags = [
        _is_yes(cell.casefold(), header)
        for header, cell in zip(headers, cells, strict=True)
        if cell.casefold() not in _EMPTY
    ]
    if not flags:
        return None
    if len(flags) < len(headers) or sum(flags) != 1:
        raise SkipItem(f"sets {sum(flags)} of {len(headers)} one-hot labels ({len(flags)} are filled)")
    return readable(headers[flags.index(True)])


def readable(column: str) -> str:
    """Converts a header to words.

    >>> readable("Pleural_Effusion"), readable("BI-RADS"), readable("tumor.grade")
    ('pleural effusion', 'BI-RADS', 'tumor grade')
    """
    words = re.sub(r"[_.\s]+", " ", column).split()
    return " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words)


def _checked(settings: Any, where: str, keys: Iterable[str]) -> dict[str, Any]:
    if not isinstance(settings, dict) or set(settings) - set(keys):
        raise UserError(f"{where}: must be an object of {', '.join(sorted(keys))}")
    if settings.get("kind", KINDS[0]) not in KINDS:
        raise UserError(f"{where}: kind {settings['kind']!r} is not one of {', '.join(KINDS)}")
    for key in ("name", "unit"):
        if not isinstance(settings.get(key, ""), str):
            raise UserError(f"{where}: {key} must be text")
    ask = settings.get("ask", [])
    if not isinstance(ask, list) or not all(isinstance(text, str) and text.strip() for text in ask):
        raise UserError(f"{where}: ask must be a list of texts")
    for word in (word for text in ask for word in _PLACEHOLDER.findall(text)):
        if word not in ("name", "options", "unit", "this"):
            raise UserError(f"{where}: {{{word}}} is not one of {{name}}, {{options}}, {{unit}}, {{this}}")
    answers = settings.get("answers", {})
    if not isinstance(answers, dict) or not all(
        answer is None or (isinstance(answer, str) and answer.strip()) for answer in answers.values()
    ):
        raise UserError(f"{where}: answers must map cells to text or null")
    if settings.get("kind") == "yes_no" and not set(answers.values()) <= {*YES_NO, None}:
        raise UserError(f"{where}: answers of kind yes_no must be yes, no or null")
    return settings


def _kind(cells: Mapping[str, int]) -> str:
    """Infers the kind of a column, tolerating few outliers; their rows are skipped."""
    total = sum(cells.values())
    binary = {text for text in cells if text.casefold() in _YES | _NO}
    numbers = {text for text in cells if _number(text) is not None}
    if binary and _fits(cells, binary, total) and not (numbers - binary):
        return "yes_no"
    few = 2 <= len({text.casefold() for text in cells}) <= min(MAX_OPTIONS, max(_FEW_OPTIONS, total // 2))
    whole = all(float(text).is_integer() for text in numbers)
    if numbers and _fits(cells, numbers, total):
        return "choice" if whole and few and len(numbers) == len(cells) else "number"
    return "choice" if few and max(map(len, cells)) <= _MAX_OPTION else "text"


def _fits(cells: Mapping[str, int], fitting: Iterable[str], total: int) -> bool:
    outliers = total - sum(cells[text] for text in fitting)
    return outliers <= max(total // _OUTLIER_SHARE, 1 if total >= _OUTLIER_CELLS else 0)


def _spellings(cells: Mapping[str, int]) -> list[str]:
    """Returns the most frequent spelling of each text, ignoring case."""
    found: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
    for text, count in cells.items():
        found[text.casefold()].append((-count, text))
    return [min(spellings)[1] for spellings in found.values()]


def _ordered(options: Iterable[str]) -> list[str]:
    """Sorts numbers by value, then texts alphabetically."""
    return sorted(options, key=lambda text: (_number(text) is None, _number(text) or 0.0, text.casefold()))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_yes(key: str, column: str) -> bool:
    if key not in _YES | _NO:
        raise SkipItem(f"the label {column} is neither yes nor no")
    return key in _YES
