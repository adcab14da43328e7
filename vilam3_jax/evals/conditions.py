"""Arms: the same questions under several conditions, such as falsified experts or blank images.

An arm writes one row per answered question, with the raw output and the parsed answer.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from vilam3_jax.data.examples import Example
from vilam3_jax.errors import UserError
from vilam3_jax.evals.protocol import Item, Protocol, score
from vilam3_jax.inference.agent import Agent, Query, Scan, Transcript

Experts = Literal["on", "off", "falsified"]
Images = Literal["true", "blank"]
Row = dict[str, Any]

BLANK_GREY = 127
MAJORITY = "majority"
# Fields of an item that its row repeats.
_COPIED = (
    "cluster", "question_type", "label_source", "oracle", "modality", "question", "options", "expert", "args",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """How questions are answered.

    Attributes:
      name: written on every row.
      stage: training stage whose export should answer; '' for no model.
      experts: 'on' shows cards and expert results, 'falsified' shows falsified results.
      images: 'blank' replaces images by uniformly grey ones.
    """

    name: str
    stage: str
    experts: Experts
    images: Images


ARMS = {
    arm.name: arm
    for arm in (
        Arm("stage3", "stage3_instruct", "off", "true"),
        Arm("stage4_no_experts", "stage4_expert", "off", "true"),
        Arm("stage4_experts", "stage4_expert", "on", "true"),
        Arm("stage4_falsified", "stage4_expert", "falsified", "true"),
        Arm("stage4_blank", "stage4_expert", "off", "blank"),
        Arm(MAJORITY, "", "off", "true"),
    )
}


def arm_of(name: str | None, experts: Experts | None, images: Images | None) -> Arm:
    """The arm of a command line.

    Args:
      name: one of `ARMS`, a new name, or None.
      experts: of a new arm, 'off' by default.
      images: images of a new arm, 'true' by default.

    Raises:
      UserError: `experts` or `images` contradict an arm of `ARMS`.
    """
    known = ARMS.get(name or "")
    if known is None:
        experts, images = experts or "off", images or "true"
        return Arm(name or f"experts_{experts}_images_{images}", "", experts, images)
    for flag, given, meant in (("experts", experts, known.experts), ("images", images, known.images)):
        if given is not None and given != meant:
            raise UserError(
                f"arm {known.name}: means --{flag}={meant}, not {given}; choose another --arm name"
            )
    return known


def answer_items(
    agent: Agent,
    protocol: Protocol,
    arm: Arm,
    items: Sequence[Item],
    load_image: Callable[[Item], np.ndarray],
    *,
    falsify_seed: int,
) -> Iterator[Row]:
    """Asks all items.

    Args:
      agent: with the expert provider of the arm.
      protocol: bounds answers and parses them.
      arm: how questions are answered.
      items: in any order; those of one image share its cached prefix if they are adjacent.
      load_image: the uint8 [H, W, 3] image of an item.
      falsify_seed: written on the rows, so that a report can reproduce what the model was shown.

    Yields:
      Rows of `row_of`, in the order of the items.
    """

    def query(item: Item) -> Query:
        image, ref = load_image(item), item.image
        shown = np.full_like(image, BLANK_GREY) if arm.images == "blank" else image
        scan = Scan(shown, item.input_key, ref.axis, ref.index, modality=ref.modality or "")
        return Query(item.question, (scan,))

    transcripts = agent.run(map(query, items), max_new_tokens=protocol.max_new_tokens)
    for item, transcript in zip(items, transcripts, strict=True):
        yield row_of(protocol, arm, item, transcript, falsify_seed=falsify_seed)


def row_of(protocol: Protocol, arm: Arm, item: Item, transcript: Transcript, *, falsify_seed: int) -> Row:
    """One line of `rows.jsonl`.

    Keys: `arm`, `item`, `cluster`, `question_type`, `label_source`, `oracle`, `modality`, `question`,
    `options`, `expert` and `args` (of the expert that could answer), `prompt` (the first turn, cards
    included), `output` (the answer), `parsed`, `gold`, `correct`, `unparsed`, `trigger` (the turn with the
    expert call, or None), `expert_called`, `expert_right` (whether the call was the one that could answer;
    None if no expert could), `expert_status` ('ok', 'failed' or None), `expert_text` (the expert's turn),
    `expert_version`, `falsify_seed` (or None), `truncated`, `cut` (characters that were removed after calls)
    and `not_made` (calls that were not executed).
    """
    called = transcript.annotation
    return {
        **_scored(protocol, arm, item, transcript.answer),
        "prompt": transcript.prompt,
        "trigger": transcript.trigger_text,
        "expert_called": called and called.expert,
        "expert_right": None if item.expert is None else transcript.trigger == (item.expert, item.args),
        "expert_status": called and called.status,
        "expert_text": transcript.expert_text,
        "expert_version": called and called.version,
        "falsify_seed": falsify_seed if arm.experts == "falsified" else None,
        "truncated": transcript.truncated,
        "cut": sum(map(len, transcript.cut)),
        "not_made": [str(call) for call in transcript.unexecuted_calls],
    }


def _scored(protocol: Protocol, arm: Arm, item: Item, output: str) -> Row:
    return {
        "arm": arm.name,
        "item": item.id,
        **{name: getattr(item, name) for name in _COPIED},
        "output": output,
        **dataclasses.asdict(score(protocol, item, output)),
    }


class Majority:
    """The most frequent answer of training, without a model.

    Of questions with the same text, else of the same type; where options differ between questions (ranges of
    numbers), the most frequent position among the options. Ties go to the answer that sorts first.
    """

    def __init__(self, examples: Iterable[Example]):
        """Counts the answers of training examples.

        Raises:
          UserError: they have no questions.
        """
        # Keys: (type, question), (type,), and (type, None) for positions among the options.
        self._counts: dict[Any, collections.Counter[Any]] = collections.defaultdict(collections.Counter)
        for example in examples:
            for qa in example.meta.get("qa") or ():
                kind, answer = str(qa["type"]), str(qa["answer"])
                self._counts[kind, str(qa["question"])][answer] += 1
                self._counts[kind,][answer] += 1
                options = list(qa.get("options") or ())
                if answer in options:
                    self._counts[kind, None][options.index(answer)] += 1
        if not self._counts:
            raise UserError("the training split has no questions; the majority answer needs them")

    def answer(self, item: Item) -> str:
        """The most frequent answer that is an option of this item; '' for an unseen type of question."""

        def is_allowed(answer: str) -> bool:
            options = item.options
            return not options or answer in options or all(part in options for part in answer.split(", "))

        kind = item.question_type
        for key in ((kind, item.question), (kind,)):
            best = self._most_frequent(key, is_allowed)
            if best is not None:
                return best
        position = self._most_frequent((kind, None), lambda position: position < len(item.options))
        return "" if position is None else item.options[position]

    def _most_frequent(self, key: Any, allowed: Callable[[Any], bool]) -> Any:
        counts = {value: count for value, count in self._counts.get(key, {}).items() if allowed(value)}
        return min(counts, key=lambda value: (-counts[value], value)) if counts else None


def majority_rows(protocol: Protocol, items: Sequence[Item], training: Iterable[Example]) -> list[Row]:
    """Rows of the majority arm, with the keys of `row_of` that need no model."""
    majority = Majority(training)
    return [_scored(protocol, ARMS[MAJORITY], item, majority.answer(item)) for item in items]


def item_set_hash(items: Iterable[Item]) -> str:
    """sha256 (hex) of the items without pixels: equal sets of questions have equal hashes."""
    digest = hashlib.sha256()
    for item in sorted(items, key=lambda item: item.id):
        fields = (item.id, item.input_key, item.question, item.answer, item.question_type, *item.options)
        digest.update("\x1f".join(fields).encode() + b"\x1e")
    return digest.hexdigest()
