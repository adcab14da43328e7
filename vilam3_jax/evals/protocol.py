"""Evaluation protocols, named, versioned and hashed: which items, which prompt, how an answer is read.

A protocol is data. Its hash covers every field, so two result files with one hash were asked and scored
alike; the code that a field names (a parser, an item rule) never changes its meaning under that name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Item:
    """One question to ask about one image.

    Attributes:
      id: `<example id>/q<position>`, unique in a dataset.
      image: what is looked at.
      input_key: content key of the decoded image or volume, under which annotations are stored.
      modality: in words, for prompts and tables.
      question: as asked, without any image marker.
      answer: the right answer.
      question_type: for grouping.
      label_source: whose word the right answer is.
      options: the possible answers; empty for an open question.
      expert: the expert that could answer it, or None.
      args: the arguments with which that expert is called.
      oracle: that expert returns the very labels the answer was made from.
      cluster: key of the patient, or of the group that patients were split by; questions of one cluster are
        not independent.
    """

    id: str
    image: ImageRef
    input_key: str
    modality: str
    question: str
    answer: str
    question_type: str
    label_source: str
    options: tuple[str, ...]
    expert: str | None
    args: str
    oracle: bool
    cluster: str


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is asked and how it is scored.

    Attributes:
      id: name without version.
      version: grows with any change of meaning.
      items: rule that makes items of Examples; `qa_of_dialogues` takes every question of every dialogue.
      split: `meta["split"]` of the Examples used.
      question_types: those asked, or empty for all.
      prompt: how an item becomes a conversation; `single_turn` asks it alone, image first, then the question.
      parser: how the answer is read, a key of `PARSERS`.
      parser_of_type: (question type, parser) pairs that differ from `parser`.
      metric: `accuracy`: share of items whose parsed answer is the right one. What cannot be parsed is wrong.
      max_new_tokens: bound on each turn the model speaks.
      description: for people; not part of the meaning, but of the hash.
    """

    id: str
    version: int
    items: str
    split: str
    question_types: tuple[str, ...]
    prompt: str
    parser: str
    parser_of_type: tuple[tuple[str, str], ...]
    metric: str
    max_new_tokens: int
    description: str

    @property
    def name(self) -> str:
        """`id@version`, as given on the command line."""
        return f"{self.id}@{self.version}"

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return {
            **dataclasses.asdict(self),
            "question_types": list(self.question_types),
            "parser_of_type": [list(pair) for pair in self.parser_of_type],
        }

    @property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON of all fields."""
        return content_hash(self.to_json())


def content_hash(record: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `record`."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            id="quickstart",
            version=1,
            items="qa_of_dialogues",
            split="heldout",
            question_types=(),
            prompt="single_turn",
            parser="by_options",
            parser_of_type=(("which_organs", "subset"),),
            metric="accuracy",
            max_new_tokens=48,
            description=(
                "Every question of every held-out dialogue, asked alone about its image, greedy decoding. "
                "Strict reading: yes or no must be the first word, an option must stand at the start."
            ),
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol called `id@version`.

    Raises:
      UserError: no such protocol; the message lists those there are.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r}: not known; choose one of {', '.join(sorted(PROTOCOLS))}")
    return PROTOCOLS[name]


def protocol_from_json(record: dict[str, Any]) -> Protocol:
    """Rebuilds a protocol from `to_json`.

    Raises:
      UserError: a field is missing or unknown.
    """
    try:
        pairs = tuple((str(kind), str(parser)) for kind, parser in record["parser_of_type"])
        types = tuple(record["question_types"])
        return Protocol(**{**record, "question_types": types, "parser_of_type": pairs})
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"protocol record: {error}; the file was written by another version") from error


# --- items


def items_of(examples: Iterable[Example], protocol: Protocol) -> list[Item]:
    """Makes the items of `protocol`, in the order of the examples.

    Reads `meta["qa"]`: a list of {question, answer, type, label_source, options, expert, args, oracle} and,
    where it is not the first image, `image`; and `meta["input_key"]`, `meta["modality"]`, `meta["group"]` or
    else `meta["patient"]`.

    Raises:
      UserError: an example of the protocol's split lacks a key; two items share an id; nothing is left.
    """
    if protocol.items != "qa_of_dialogues" or protocol.prompt != "single_turn":
        raise UserError(
            f"protocol {protocol.name}: item rule {protocol.items!r} with prompt {protocol.prompt!r} unknown"
        )
    items: list[Item] = []
    seen: set[str] = set()
    for example in examples:
        if example.meta.get("split") != protocol.split or not example.meta.get("qa"):
            continue
        for position, qa in enumerate(example.meta["qa"]):
            try:
                item = _item(example, position, qa)
            except (KeyError, IndexError, TypeError) as error:
                raise UserError(
                    f"example {example.id!r}, question {position}: {error!r} in its meta; "
                    "prepare the dataset again"
                ) from error
            if protocol.question_types and item.question_type not in protocol.question_types:
                continue
            if item.id in seen:
                raise UserError(f"item {item.id!r}: stands twice in the data; remove the doubled example")
            seen.add(item.id)
            items.append(item)
    if not items:
        raise UserError(f"protocol {protocol.name}: no question in split {protocol.split!r}; check --data")
    return items


def _item(example: Example, position: int, qa: dict[str, Any]) -> Item:
    return Item(
        id=f"{example.id}/q{position}",
        image=example.images[qa.get("image", 0)],
        input_key=str(example.meta["input_key"]),
        modality=str(example.meta["modality"]),
        question=str(qa["question"]),
        answer=str(qa["answer"]),
        question_type=str(qa["type"]),
        label_source=str(qa["label_source"]),
        options=tuple(str(option) for option in qa.get("options") or ()),
        expert=qa["expert"],
        args=str(qa.get("args") or ""),
        oracle=bool(qa["oracle"]),
        cluster=str(example.meta.get("group") or example.meta["patient"]),
    )


def limit_items(items: Sequence[Item], per_type: int | None) -> list[Item]:
    """Keeps at most `per_type` items of each question type, spread over clusters as evenly as they allow.

    Within a type, clusters take turns; inside a cluster items follow the sha256 of their id. The choice
    depends on nothing but the items, so every arm asks the same questions.

    Args:
      items: all items.
      per_type: the limit, or None for all.

    Returns:
      The kept items in their original order.
    """
    if per_type is None:
        return list(items)
    if per_type < 1:
        raise UserError(f"limit {per_type}: must be at least 1 question per type")

    def key(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    by_type: dict[str, dict[str, list[Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        by_type[item.question_type][item.cluster].append(item)
    kept: set[str] = set()
    for clusters in by_type.values():
        turns = [
            (turn, key(cluster), item.id)
            for cluster, members in clusters.items()
            for turn, item in enumerate(sorted(members, key=lambda item: key(item.id)))
        ]
        kept.update(item_id for _, _, item_id in sorted(turns)[:per_type])
    return [item for item in items if item.id in kept]


# --- answers


def normalise(text: str) -> str:
    """Lower case, single spaces, plain dashes, and no punctuation at either end."""
    text = text.lower().replace("–", "-").replace("—", "-").replace("−", "-")
    return " ".join(text.split()).strip(" .,;:!?\"'`")


def parse_yes_no(text: str, options: Sequence[str] = ("yes", "no")) -> str | None:
    """`yes` or `no` if that is the first word, else None. 'Abnormal' is not 'no'."""
    first = re.match(r"[a-z]+", normalise(text))
    return first.group() if first and first.group() in ("yes", "no") else None


def parse_option(text: str, options: Sequence[str]) -> str | None:
    """The option that the answer is, else the longest option that stands at its start as whole words.

    Returns:
      The option as spelt in `options`, or None.
    """
    answer = normalise(text)
    for option in sorted(options, key=lambda option: len(normalise(option)), reverse=True):
        wanted = normalise(option)
        if wanted and re.match(re.escape(wanted) + r"(?![\w-])", answer):
            return option
    return None


_NUMBER = r"(\d+(?:[.,]\d+)?)"
_UNIT = r"\s*(?:ml|millilit(?:er|re)s?|mm|cm|cc|cm3)?\s*"
_BELOW = re.compile(rf"(?:less than|under|below|up to|<)\s*{_NUMBER}{_UNIT}$")
_ABOVE = re.compile(rf"(?:more than|over|above|at least|>|>=)\s*{_NUMBER}{_UNIT}$")
_BETWEEN = re.compile(rf"(?:between\s+|from\s+)?{_NUMBER}{_UNIT}(?:-|to|and){_UNIT}{_NUMBER}{_UNIT}$")
_SINGLE = re.compile(rf"(?:about\s+|approximately\s+|around\s+)?{_NUMBER}{_UNIT}(?![\w-])")


def parse_range(option: str) -> tuple[float, float] | None:
    """Reads `less than 50 ml`, `50 to 200 ml` or `more than 200 ml` as [low, high), else None."""
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
    """An option by its words, by the same range in other words, or by one number that lies inside its range.

    Returns:
      The option as spelt in `options`, or None.
    """
    if found := parse_option(text, options):
        return found
    ranges = {option: bounds for option in options if (bounds := parse_range(option))}
    said = parse_range(text)
    if said:
        return next((option for option, bounds in ranges.items() if bounds == said), None)
    number = _SINGLE.match(normalise(text))
    if not number or re.match(r"\s*(?:-|to\b|and\b)", normalise(text)[number.end() :]):
        return None
    value = _number(number[1])
    return next((option for option, (low, high) in ranges.items() if low <= value < high), None)


def parse_list(text: str, options: Sequence[str] = ()) -> str | None:
    """A list of names as one canonical text: parts sorted and joined by `, `; None if there is none."""
    parts = {normalise(part) for part in re.split(r",|;|\band\b", text)} - {""}
    return ", ".join(sorted(parts)) or None


def parse_subset(text: str, options: Sequence[str]) -> str | None:
    """Some of the options, separated by commas or `and`, as one canonical text in the order of `options`.

    Returns:
      The options named, joined by `, `; None if there is none or anything else is named.
    """
    listed = parse_list(text)
    wanted = {normalise(option): option for option in options}
    if listed is None or any(part not in wanted for part in listed.split(", ")):
        return None
    named = set(listed.split(", "))
    return ", ".join(option for name, option in wanted.items() if name in named)


def parse_exact(text: str, options: Sequence[str] = ()) -> str | None:
    """The normalised text, or None if nothing is left of it."""
    return normalise(text) or None


def parse_by_options(text: str, options: Sequence[str]) -> str | None:
    """Chooses the parser by the options alone, never by the right answer.

    {yes, no}: `parse_yes_no`; all ranges of numbers: `parse_number_range`; other options: `parse_option`; no
    options: `parse_list`, under which a single name is a list of one.
    """
    if not options:
        return parse_list(text)
    if {normalise(option) for option in options} == {"yes", "no"}:
        return parse_yes_no(text)
    if all(parse_range(option) for option in options):
        return parse_number_range(text, options)
    return parse_option(text, options)


PARSERS: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "by_options": parse_by_options,
    "yes_no": parse_yes_no,
    "option": parse_option,
    "number_range": parse_number_range,
    "subset": parse_subset,
    "list": parse_list,
    "exact": parse_exact,
}


@dataclasses.dataclass(frozen=True)
class Score:
    """How one answer was read: `parsed` is None if the parser found nothing, and then `correct` is False."""

    parsed: str | None
    gold: str
    correct: bool

    @property
    def unparsed(self) -> bool:
        """Nothing was found in the answer."""
        return self.parsed is None


def score(protocol: Protocol, item: Item, output: str) -> Score:
    """Reads `output` and the right answer with the same parser, and compares.

    Raises:
      UserError: the parser finds nothing in the right answer itself, so the item is at fault; or the
        protocol names an unknown parser or metric.
    """
    name = dict(protocol.parser_of_type).get(item.question_type, protocol.parser)
    if name not in PARSERS or protocol.metric != "accuracy":
        raise UserError(f"protocol {protocol.name}: parser {name!r} or metric {protocol.metric!r} unknown")
    parse = PARSERS[name]
    gold = parse(item.answer, item.options)
    if gold is None:
        raise UserError(f"item {item.id!r}: its own answer {item.answer!r} is none of {list(item.options)}")
    parsed = parse(output, item.options)
    return Score(parsed, gold, parsed is not None and normalise(parsed) == normalise(gold))
