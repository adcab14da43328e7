"""Arms: the same questions under several conditions, such as falsified experts or blank images.

An arm writes one row per answered question, with the raw output and the parsed answer.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from vilam3_jax.data.examples import Example
from vilam3_jax.errors import UserError
from vilam3_jax.evals import changes
from vilam3_jax.evals.items import Item
from vilam3_jax.evals.protocol import Protocol as EvaluationProtocol
from vilam3_jax.evals.protocol import score

Experts = Literal["on", "off", "falsified", "failing"]
Row = dict[str, Any]

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
      stage: training stage whose export should answer; '' for no model, or for any.
      experts: 'on' shows cards and expert results, 'falsified' shows falsified results, 'failing' failures.
      images: what is shown, a key of `changes.IMAGE_CHANGES`.
      question: how it is asked, a key of `changes.QUESTION_CHANGES`.
    """

    name: str
    stage: str
    experts: Experts
    images: str
    question: str = "true"

    @property
    def is_majority(self) -> bool:
        """Whether it answers without a model."""
        return self.name == MAJORITY

    @property
    def record(self) -> dict[str, str]:
        """What `result.json` says of it."""
        found = {"name": self.name, "experts": self.experts, "images": self.images}
        return found if self.question == "true" else {**found, "question": self.question}


ARMS = {
    arm.name: arm
    for arm in (
        Arm("stage3", "stage3_instruct", "off", "true"),
        Arm("stage4_no_experts", "stage4_expert", "off", "true"),
        Arm("stage4_experts", "stage4_expert", "on", "true"),
        Arm("stage4_falsified", "stage4_expert", "falsified", "true"),
        Arm("stage4_blank", "stage4_expert", "off", "blank"),
        Arm(MAJORITY, "", "off", "true"),
        Arm("model", "", "off", "true"),
        Arm("no_image", "", "off", "none"),
        Arm("blank", "", "off", "blank"),
        Arm("other_patient", "", "off", "other_patient"),
        Arm("region_hidden", "", "off", "region_hidden"),
        Arm("experts", "", "on", "true"),
        Arm("experts_falsified", "", "falsified", "true"),
        Arm("experts_failing", "", "failing", "true"),
        Arm("experts_other_modality", "", "on", "other_modality"),
        Arm("jpeg", "", "off", "jpeg"),
        Arm("rotated", "", "off", "rotated"),
        Arm("wider_window", "", "off", "wider_window"),
        Arm("framed", "", "off", "true", "framed"),
        Arm("polite", "", "off", "true", "polite"),
        Arm("options_reversed", "", "off", "true", "options_reversed"),
    )
}


def arm_of(name: str | None, experts: str | None, images: str | None) -> Arm:
    """The arm of a command line.

    Args:
      name: one of `ARMS`, a new name, or None.
      experts: of a new arm, 'off' by default.
      images: images of a new arm, 'true' by default.

    Raises:
      UserError: `experts` or `images` contradict an arm of `ARMS`, or are unknown.
    """
    known = ARMS.get(name or "")
    if known is None:
        experts, images = experts or "off", images or "true"
        if experts not in get_args(Experts) or images not in changes.IMAGE_CHANGES:
            raise UserError(f"experts {experts!r} or images {images!r} unknown")
        return Arm(name or f"experts_{experts}_images_{images}", "", experts, images)  # pyright: ignore
    for flag, given, meant in (("experts", experts, known.experts), ("images", images, known.images)):
        if given is not None and given != meant:
            raise UserError(
                f"arm {known.name}: means --{flag}={meant}, not {given}; choose another --arm name"
            )
    return known


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to an item.

    Attributes:
      item: as it was asked.
      text: the raw output.
      details: further keys of the row, such as the prompt and the expert call; see `answerers`.
    """

    item: Item
    text: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Answerer(Protocol):
    """A source of answers: a model, somebody's file, or a server."""

    def answers(
        self, protocol: EvaluationProtocol, arm: Arm, items: Sequence[Item], done: int
    ) -> Iterator[Answer]:
        """Answers the items of an arm, in order.

        Args:
          protocol: bounds answers.
          arm: how questions are answered.
          items: all items of the protocol, some of which the arm may leave out.
          done: number of answers to skip, which an earlier run has given.
        """
        ...


def row_of(protocol: EvaluationProtocol, arm: Arm, answer: Answer) -> Row:
    """One line of `rows.jsonl`.

    Keys: `arm`, `item`, `cluster`, `question_type`, `label_source`, `oracle`, `modality`, `question`,
    `options`, `expert` and `args` (of the expert that could answer), `groups` and `answer_spec` if there are
    any, `output` (the raw answer), `parsed`, `gold`, `correct`, `unparsed`, and the details of the answer.
    """
    item = answer.item
    return {
        "arm": arm.name,
        "item": item.id,
        **{name: getattr(item, name) for name in _COPIED},
        **({"groups": dict(item.groups)} if item.groups else {}),
        **({"answer_spec": dict(item.answer_spec)} if item.answer_spec else {}),
        "output": answer.text,
        **dataclasses.asdict(score(protocol, item, answer.text)),
        **answer.details,
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


def majority_rows(
    protocol: EvaluationProtocol, items: Sequence[Item], training: Iterable[Example]
) -> list[Row]:
    """Rows of the majority arm, without details."""
    majority = Majority(training)
    return [row_of(protocol, ARMS[MAJORITY], Answer(item, majority.answer(item))) for item in items]
