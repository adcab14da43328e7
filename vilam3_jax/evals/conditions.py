"""Arms: the same questions answered by different checkpoints; experts on, off or lying; true or blank images.

Every arm writes rows, one answered question each, with the raw output beside what was read from it.
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
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.inference.agent import Agent, Query, Scan, Transcript

Experts = Literal["on", "off", "falsified"]
Images = Literal["true", "blank"]
Row = dict[str, Any]

BLANK_GREY = 127
MAJORITY = "majority"


@dataclasses.dataclass(frozen=True)
class Arm:
    """How questions are answered.

    Attributes:
      name: on every row.
      stage: the training stage whose export is meant to answer; '' for no model.
      experts: whether cards are shown and experts answer, and whether what they say is falsified.
      images: the true ones, or evenly grey ones of the same size.
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
    """The arm meant by the command line.

    Args:
      name: one of `ARMS`, another name to put on the rows, or None.
      experts: overrides what the name implies; for a new name the default is 'off'.
      images: likewise; the default is 'true'.

    Raises:
      UserError: `experts` or `images` contradict a known name.
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


def blank(image: np.ndarray) -> np.ndarray:
    """An evenly grey image of the same size: uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    return np.full_like(image, BLANK_GREY)


def order_for_batches(items: Sequence[protocols.Item]) -> list[protocols.Item]:
    """Puts questions of like length beside each other, so that few positions are padding.

    The expert's turn is the longest part: items that call the same expert about one scan stand together.
    """

    def key(item: protocols.Item) -> tuple[Any, ...]:
        return item.expert or "", item.input_key, len(item.question), item.id

    return sorted(items, key=key)


def answer_items(
    agent: Agent,
    protocol: protocols.Protocol,
    arm: Arm,
    items: Sequence[protocols.Item],
    load_image: Callable[[protocols.Item], np.ndarray],
    *,
    falsify_seed: int,
) -> Iterator[Row]:
    """Asks all items in batches.

    Args:
      agent: with the expert provider that fits the arm.
      protocol: says how long an answer may be and how it is read.
      arm: whose name and image treatment apply.
      items: in any order; rows come in the order of `order_for_batches`.
      load_image: gives the uint8 [H, W, 3] picture of an item.
      falsify_seed: written on the rows, so that a report can draw what the model was shown.

    Yields:
      Rows; see `row_of`.
    """
    ordered = order_for_batches(items)
    for start in range(0, len(ordered), agent.batch_size):
        batch = ordered[start : start + agent.batch_size]
        queries = []
        for item in batch:
            image = load_image(item)
            scan = Scan(
                image=blank(image) if arm.images == "blank" else image,
                input_key=item.input_key,
                axis=item.image.axis,
                index=item.image.index,
                modality=item.image.modality or "",
            )
            queries.append(Query(item.question, (scan,)))
        transcripts = agent.run(queries, max_new_tokens=protocol.max_new_tokens)
        for item, transcript in zip(batch, transcripts, strict=True):
            yield row_of(protocol, arm, item, transcript, falsify_seed=falsify_seed)


def row_of(
    protocol: protocols.Protocol, arm: Arm, item: protocols.Item, transcript: Transcript, *, falsify_seed: int
) -> Row:
    """One line of `rows.jsonl`.

    Keys: `arm`, `item`, `cluster`, `question_type`, `label_source`, `oracle`, `modality`, `question`,
    `options`, `expert` and `args` (who could answer), `prompt` (the first turn, cards included), `output`
    (the answer), `parsed`, `gold`, `correct`, `unparsed`, `trigger` (the turn in which the model called an
    expert, or None), `expert_called`, `expert_right` (called the expert that could answer; None where none
    could), `expert_status` ('ok', 'failed' or None), `expert_text` (what it was told), `expert_version`,
    `falsify_seed` (or None), `truncated`, `cut` (characters that the model wrote between its call and the
    expert's turn) and `not_made` (calls that nobody answered).
    """
    return {
        **_scored(protocol, arm, item, transcript.answer),
        "prompt": transcript.prompt,
        "trigger": transcript.trigger_text,
        "expert_called": None if transcript.trigger is None else transcript.trigger[0],
        "expert_right": None if item.expert is None else transcript.trigger == (item.expert, item.args),
        "expert_status": None if transcript.annotation is None else transcript.annotation.status,
        "expert_text": transcript.expert_text,
        "expert_version": None if transcript.annotation is None else transcript.annotation.version,
        "falsify_seed": falsify_seed if arm.experts == "falsified" else None,
        "truncated": transcript.truncated,
        "cut": sum(map(len, transcript.cut)),
        "not_made": [str(call) for call in transcript.not_made],
    }


def _scored(protocol: protocols.Protocol, arm: Arm, item: protocols.Item, output: str) -> Row:
    read = protocols.score(protocol, item, output)
    return {
        "arm": arm.name,
        "item": item.id,
        "cluster": item.cluster,
        "question_type": item.question_type,
        "label_source": item.label_source,
        "oracle": item.oracle,
        "modality": item.modality,
        "question": item.question,
        "options": list(item.options),
        "expert": item.expert,
        "args": item.args,
        "output": output,
        "parsed": read.parsed,
        "gold": read.gold,
        "correct": read.correct,
        "unparsed": read.unparsed,
    }


# --- the majority answer


class Majority:
    """Answers with what was most often right in training, without looking at anything.

    First among questions of the same words, then of the same type; where options change from question to
    question (ranges of numbers), by their place among the options. Ties go to the answer that sorts first.
    """

    def __init__(self, examples: Iterable[Example]):
        """Counts the answers of training examples.

        Raises:
          UserError: none of them has questions.
        """
        self._by_question: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self._by_type: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._by_place: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
        for example in examples:
            for qa in example.meta.get("qa") or ():
                kind, answer = str(qa["type"]), str(qa["answer"])
                self._by_question[kind, str(qa["question"])][answer] += 1
                self._by_type[kind][answer] += 1
                options = list(qa.get("options") or ())
                if answer in options:
                    self._by_place[kind][options.index(answer)] += 1
        if not self._by_type:
            raise UserError("the training split has no questions; the majority answer needs them")

    def answer(self, item: protocols.Item) -> str:
        """The most frequent answer that this item allows; '' if training never saw such a question."""
        for counts in (
            self._by_question.get((item.question_type, item.question)),
            self._by_type.get(item.question_type),
        ):
            best = _most_frequent({a: n for a, n in (counts or {}).items() if _allowed(a, item.options)})
            if best is not None:
                return best
        places = self._by_place.get(item.question_type, {})
        place = _most_frequent({p: n for p, n in places.items() if p < len(item.options)})
        return "" if place is None else item.options[place]


def _allowed(answer: str, options: Sequence[str]) -> bool:
    return not options or answer in options or all(part in options for part in answer.split(", "))


def _most_frequent(counts: dict[Any, int]) -> Any:
    return min(counts, key=lambda key: (-counts[key], key)) if counts else None


def majority_rows(
    protocol: protocols.Protocol, items: Sequence[protocols.Item], training: Iterable[Example]
) -> list[Row]:
    """Rows of the majority arm, with the keys of `row_of` that make sense without a model."""
    majority = Majority(training)
    return [_scored(protocol, ARMS[MAJORITY], item, majority.answer(item)) for item in items]


def item_set_hash(items: Iterable[protocols.Item]) -> str:
    """sha256 (hex) of all that makes up the items but pixels: equal sets of questions have equal hashes."""
    digest = hashlib.sha256()
    for item in sorted(items, key=lambda item: item.id):
        fields = (item.id, item.input_key, item.question, item.answer, item.question_type, *item.options)
        digest.update("\x1f".join(fields).encode() + b"\x1e")
    return digest.hexdigest()
