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
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vilam3_jax.errors import UserError
from vilam3_jax.evals import protocols
from vilam3_jax.evals.items import ITEM_RULES, Item, ItemRule
from vilam3_jax.evals.parsers import PARSERS, Parser
from vilam3_jax.evals.parsers.anchored import normalise
from vilam3_jax.evals.parsers.anchored import parse_by_options as parse_by_options
from vilam3_jax.evals.parsers.anchored import parse_yes_no as parse_yes_no
from vilam3_jax.evals.prompts import PROMPTS, PromptRule

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
    def record(self) -> dict[str, Any]:
        """The fields. One that has its default is left out, so that a new field of this class does not change
        the hashes of protocols that do not use it.
        """
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON of `record`."""
        return content_hash(self.record)


@dataclasses.dataclass(frozen=True)
class Protocol(AnyProtocol):
    """Questions about images, asked of a generative model.

    Attributes:
      items: rule that makes items of Examples, a key of `ITEM_RULES`.
      split: `meta["split"]` of the Examples used; '' for the one of the command line.
      question_types: those asked; empty for all.
      prompt: rule that makes a request of an item, a key of `PROMPTS`.
      parser: how the answer is read, a key of `PARSERS`.
      parser_of_type: (question type, parser) pairs that differ from `parser`.
      metric: the headline metric, a name of `metrics.base`. An unparsed answer counts as wrong.
      max_new_tokens: limit of each turn of the model.
      description: for people, but part of the hash.
      datasets: names of the datasets asked about; empty for all.
      metrics: further metrics.
      aggregation: `pooled`, over all questions; `mean_of_types`, the mean over question types.
      temperature: of sampling; 0 for greedy decoding.
      answers: `text`, generated; `probabilities`, those of the options in one pass. The answer is then the
        likeliest option, and the row holds all probabilities.
      arms: names of the conditions under which the questions are asked if the command line names none.
      contrasts: (name, arm, arm): paired differences, the first arm minus the second.
      compare_text: compare answers as they were parsed, without normalisation.
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
    datasets: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    aggregation: str = "pooled"
    temperature: float = 0.0
    answers: str = "text"
    arms: tuple[str, ...] = ()
    contrasts: tuple[tuple[str, str, str], ...] = ()
    compare_text: bool = False


_Registered = TypeVar("_Registered", bound=AnyProtocol)
_registry: dict[str, AnyProtocol] = {}


def register(
    protocol: _Registered,
    parsers: Mapping[str, Parser] | None = None,
    *,
    prompts: Mapping[str, PromptRule] | None = None,
    item_rules: Mapping[str, ItemRule] | None = None,
) -> _Registered:
    """Adds a protocol, with the parsers, prompts and item rules that it brings.

    Raises:
      UserError: another protocol, parser, prompt or item rule has the name.
    """
    _add(protocol, "parser", PARSERS, parsers)
    _add(protocol, "prompt", PROMPTS, prompts)
    _add(protocol, "item rule", ITEM_RULES, item_rules)
    known = _registry.setdefault(protocol.name, protocol)
    if known.hash != protocol.hash:
        raise UserError(f"protocol {protocol.name} exists already with other fields; raise its version")
    return protocol


def _add(
    protocol: AnyProtocol, kind: str, known: dict[str, Callable[..., Any]], new: Mapping[str, Any] | None
) -> None:
    for name, rule in (new or {}).items():
        if known.setdefault(name, rule) is not rule:
            raise UserError(f"protocol {protocol.name}: {kind} {name!r} exists already; choose another name")


def names() -> list[str]:
    """The registered protocols, as `id@version`."""
    importlib.import_module("vilam3_jax.evals.retrieval")  # registers its own
    for module in protocols.MODULES:
        importlib.import_module(f"{protocols.__name__}.{module}")
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


@dataclasses.dataclass(frozen=True)
class Score:
    """How one answer was read; if the parser found nothing, `parsed` is None and `correct` is False.

    `parsed` and `gold` are JSON values.
    """

    parsed: Any
    gold: Any
    correct: bool
    unparsed: bool


def score(protocol: Protocol, item: Item, output: str) -> Score:
    """Reads `output` and the right answer with the same parser, and compares.

    Raises:
      UserError: the item's own answer cannot be parsed, or the parser is unknown.
    """
    name = dict(protocol.parser_of_type).get(item.question_type, protocol.parser)
    if name not in PARSERS:
        raise UserError(f"protocol {protocol.name}: parser {name!r} unknown")
    parse = PARSERS[name]
    gold = parse(item.answer, item.options, **item.answer_spec)
    if gold is None:
        wanted = f"is none of {list(item.options)}" if item.options else "cannot be read"
        raise UserError(f"item {item.id!r}: its own answer {item.answer!r} {wanted}")
    parsed = parse(output, item.options, **item.answer_spec)
    return Score(parsed, gold, _equal(parsed, gold, protocol.compare_text), parsed is None)


def _equal(parsed: Any, gold: Any, verbatim: bool) -> bool:
    if isinstance(parsed, str) and isinstance(gold, str) and not verbatim:
        return normalise(parsed) == normalise(gold)
    return parsed is not None and parsed == gold
