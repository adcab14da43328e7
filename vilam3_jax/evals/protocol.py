"""Evaluation protocols, named, versioned and hashed: which items, which prompt, how an answer is read.

A protocol is data. Its hash covers every field, so results with equal hashes were asked and scored alike; a
parser must therefore never change its meaning under the name that a protocol gives.

A protocol from another package is added by `register`, or by an entry point of the group `vilam3.protocols`;
see docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.errors import UserError
from vilam3_jax.evals.answer_parsers import PARSERS, Parser, normalise

ENTRY_POINTS = "vilam3.protocols"


@dataclasses.dataclass(frozen=True)
class AnyProtocol:
    """Base of protocols.

    Attributes:
      id: name without version.
      version: incremented with every change of meaning.
    """

    id: str
    version: int

    @property
    def name(self) -> str:
        """`id@version`, as given on the command line."""
        return f"{self.id}@{self.version}"

    @property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON of all fields."""
        return content_hash(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Protocol(AnyProtocol):
    """Questions about images, asked of a generative model.

    Attributes:
      items: rule that makes items of Examples; `qa_of_dialogues` takes every question of every dialogue.
      split: `meta["split"]` of the Examples used.
      question_types: those asked; empty for all.
      prompt: how an item becomes a conversation; `single_turn` asks it alone, image before question.
      parser: how the answer is read, a key of `PARSERS`.
      parser_of_type: (question type, parser) pairs that differ from `parser`.
      metric: `accuracy`, the share of items with the right parsed answer; an unparsed answer counts as wrong.
      max_new_tokens: limit of each turn of the model.
      description: for people, but part of the hash.
    """

    items: str
    split: str
    question_types: tuple[str, ...]
    prompt: str
    parser: str
    parser_of_type: tuple[tuple[str, str], ...]
    metric: str
    max_new_tokens: int
    description: str


_Registered = TypeVar("_Registered", bound=AnyProtocol)
_registry: dict[str, AnyProtocol] = {}


def register(protocol: _Registered, parsers: Mapping[str, Parser] | None = None) -> _Registered:
    """Adds a protocol, with the parsers that it brings.

    Raises:
      UserError: another protocol or parser has the name.
    """
    for name, parser in (parsers or {}).items():
        if PARSERS.setdefault(name, parser) is not parser:
            raise UserError(f"protocol {protocol.name}: parser {name!r} exists already; choose another name")
    known = _registry.setdefault(protocol.name, protocol)
    if known.hash != protocol.hash:
        raise UserError(f"protocol {protocol.name} exists already with other fields; raise its version")
    return protocol


def names() -> list[str]:
    """The registered protocols, as `id@version`."""
    importlib.import_module("vilam3_jax.evals.retrieval")  # registers its own
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        register(entry.load())
    return sorted(_registry)


def get(name: str) -> AnyProtocol:
    """The protocol `id@version`.

    Raises:
      UserError: there is none; lists those there are.
    """
    if name not in (known := names()):
        raise UserError(f"protocol {name!r}: not known; choose one of {', '.join(known)}")
    return _registry[name]


def content_hash(record: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `record`."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


QUICKSTART = register(
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
        # Part of the hash, so it stays as it is.
        description=(
            "Every question of every held-out dialogue, asked alone about its image, greedy decoding. "
            "Strict reading: yes or no must be the first word, an option must stand at the start."
        ),
    )
)


# --- items


@dataclasses.dataclass(frozen=True)
class Item:
    """One question about one image.

    Attributes:
      id: `<example id>/q<position>`, unique in a dataset.
      image: the image.
      input_key: content key of the decoded image or volume, under which annotations are stored.
      modality: in plain language, for prompts and tables.
      question: without image marker.
      answer: the right answer.
      question_type: for grouping.
      label_source: where the right answer is from.
      options: the possible answers; empty for an open question.
      expert: the expert that could answer it, or None.
      args: the arguments with which that expert is called.
      oracle: the expert returns the labels that the answer was made from.
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


def items_of(examples: Iterable[Example], protocol: Protocol) -> list[Item]:
    """The items of `protocol`, in the order of the examples.

    Reads `meta["qa"]`: a list of {question, answer, type, label_source, options, expert, args, oracle} and
    optionally `image`, by default 0; and `meta["input_key"]`, `meta["modality"]`, `meta["group"]` or else
    `meta["patient"]`.

    Raises:
      UserError: an example of the protocol's split lacks a key, two items have one id, or there is no item.
    """
    if protocol.items != "qa_of_dialogues" or protocol.prompt != "single_turn":
        raise UserError(
            f"protocol {protocol.name}: item rule {protocol.items!r} with prompt {protocol.prompt!r} unknown"
        )
    items: dict[str, Item] = {}
    for example in examples:
        if example.meta.get("split") != protocol.split:
            continue
        for position, qa in enumerate(example.meta.get("qa") or ()):
            try:
                item = _item(example, position, qa)
            except (KeyError, IndexError, TypeError) as error:
                raise UserError(
                    f"example {example.id!r}, question {position}: {error!r} in its meta; "
                    "prepare the dataset again"
                ) from error
            if protocol.question_types and item.question_type not in protocol.question_types:
                continue
            if items.setdefault(item.id, item) is not item:
                raise UserError(f"item {item.id!r} is twice in the data; remove the duplicate example")
    if not items:
        raise UserError(f"protocol {protocol.name}: no question in split {protocol.split!r}; check --data")
    return list(items.values())


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


def limit_items(items: Sequence[Item], per_type: int | None, per_other_type: int | None = None) -> list[Item]:
    """Keeps at most `per_type` items of each question type, spread evenly over clusters; None keeps all.

    With `per_other_type`, `per_type` holds only for items that an expert can answer and did not label; the
    others of a type are counted separately.

    Within a type, clusters take turns; within a cluster, items are ordered by the sha256 of their id. The
    choice depends on the items alone, so every condition asks the same questions. Order is kept.
    """
    if per_type is None and per_other_type is None:
        return list(items)
    for limit in (per_type, per_other_type):
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit}: must be at least 1 question per type")

    def key(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    groups: dict[tuple[str, bool, str], list[str]] = defaultdict(list)
    for item in items:
        other = per_other_type is not None and (item.expert is None or item.oracle)
        groups[item.question_type, other, item.cluster].append(item.id)
    turns: dict[tuple[str, bool], list[tuple[int, str, str]]] = defaultdict(list)
    for (kind, other, cluster), ids in groups.items():
        turns[kind, other] += [(turn, key(cluster), name) for turn, name in enumerate(sorted(ids, key=key))]
    kept = {
        name
        for (_, other), of_type in turns.items()
        for _, _, name in sorted(of_type)[: per_other_type if other else per_type]
    }
    return [item for item in items if item.id in kept]


# --- scores


@dataclasses.dataclass(frozen=True)
class Score:
    """How one answer was read; if the parser found nothing, `parsed` is None and `correct` is False."""

    parsed: str | None
    gold: str
    correct: bool
    unparsed: bool


def score(protocol: Protocol, item: Item, output: str) -> Score:
    """Reads `output` and the right answer with the same parser, and compares.

    Raises:
      UserError: the item's own answer cannot be parsed, or the parser or metric is unknown.
    """
    name = dict(protocol.parser_of_type).get(item.question_type, protocol.parser)
    if name not in PARSERS or protocol.metric != "accuracy":
        raise UserError(f"protocol {protocol.name}: parser {name!r} or metric {protocol.metric!r} unknown")
    parse = PARSERS[name]
    gold = parse(item.answer, item.options)
    if gold is None:
        raise UserError(f"item {item.id!r}: its own answer {item.answer!r} is none of {list(item.options)}")
    parsed = parse(output, item.options)
    is_correct = parsed is not None and normalise(parsed) == normalise(gold)
    return Score(parsed, gold, is_correct, parsed is None)
