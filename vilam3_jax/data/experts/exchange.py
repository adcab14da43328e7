"""The exchange with experts: the one function that turns their results into a turn and its overlays.

Training renders stored examples with it (`data/render.py`), and inference live dialogues
(`inference/agent.py`), so that at inference a model sees exactly the tokens it was trained on.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vilam3_jax.data.examples import Turn
from vilam3_jax.data.experts.cards import Card, render_cards
from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.overlays import expert_overlay
from vilam3_jax.data.experts.record import THRESHOLD, Annotation
from vilam3_jax.data.experts.wording import PLAIN, Plane, Wording, doubts, wording_named
from vilam3_jax.errors import UserError

TASKS = ("segmentation", "classification")

Overlay = Callable[[np.ndarray], np.ndarray]
"""From the slice as the model sees it, uint8 [H, W, 3], to the same with coloured labels."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How experts' results are told.

    Attributes:
      wording: the sentences.
      verdicts: whether the model is told what the checks doubt.
      threshold: a class whose probability is above it is told as present.
    """

    wording: Wording = PLAIN
    verdicts: bool = False
    threshold: float = THRESHOLD

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Style:
        """The style of a model.

        Args:
          model: the `model` section of a config.

        Raises:
          UserError: an unknown wording, or a threshold that is no probability.
        """
        threshold = model.get("expert_threshold", THRESHOLD)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise UserError(f"config model.expert_threshold={threshold!r}: must be from 0 to 1")
        return cls(
            wording_named(str(model.get("expert_wording", "plain"))),
            bool(model.get("expert_verdicts", False)),
            float(threshold),
        )


DEFAULT_STYLE = Style()


@dataclasses.dataclass(frozen=True)
class Result:
    """One expert's result, and the slice on which it is shown.

    Attributes:
      annotation: of the expert; a failed one becomes a sentence that says so.
      task: `segmentation` or `classification`, as on its card.
      plane: the slice shown.
    """

    annotation: Annotation
    task: str
    plane: Plane = dataclasses.field(default_factory=Plane)

    @property
    def shows_overlay(self) -> bool:
        """Whether the expert's turn shows an overlay for it."""
        return self.task == "segmentation" and self.annotation.status == "ok"

    def problem(self) -> str | None:
        """Why it cannot be shown, or None."""
        found = self.annotation
        if found.status == "failed":
            return None
        if self.task not in TASKS:
            return f"task {self.task!r} of {found.expert} cannot be told; use one of {', '.join(TASKS)}"
        if self.task == "classification":
            return None if found.probabilities else f"annotation of {found.expert} has no probabilities"
        if found.label_shape is None:
            return f"annotation of {found.expert} has no label map"
        if self.plane.axis is None or self.plane.index is None:
            return f"annotation of {found.expert} is of a volume, and the image is no slice of one"
        planes = found.label_shape[self.plane.axis]
        if not 0 <= self.plane.index < planes:
            return f"slice {self.plane.index} of axis {self.plane.axis}, which has {planes}"
        return None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a model is shown of its experts' results.

    Attributes:
      text: of the expert's turn, with the question at its end.
      overlays: one for each image marker in `text`, in order.
    """

    text: str
    overlays: tuple[Overlay, ...]


def call_turn(cards: Sequence[Card], calls: Sequence[Call], style: Style = DEFAULT_STYLE) -> Turn:
    """The assistant's turn that calls experts; a target.

    Args:
      cards: of the experts, one for each call.
      calls: in the order in which they are answered.
      style: of the model.
    """
    return Turn("assistant", style.wording.call(cards, calls), supervised=True)


def exchange(results: Sequence[Result], question: str, style: Style = DEFAULT_STYLE) -> Exchange:
    """The experts' turn: the results of all calls, and the question again.

    Args:
      results: of the calls of one turn, in order; at least one.
      question: without image markers.
      style: of the model.

    Raises:
      ValueError: a result that cannot be shown, see `Result.problem`.
    """
    said, told = [], []
    for result in results:
        if problem := result.problem():
            raise ValueError(problem)
        text, task = _statement(result, style)
        if len(results) > 1:
            text = f"{Call(result.annotation.expert, result.annotation.args)} {text}".rstrip() + "\n"
        said.append(text)
        told.append(task)
    return Exchange("".join(said) + style.wording.question(question, told), overlays_of(results))


def overlays_of(results: Sequence[Result]) -> tuple[Overlay, ...]:
    """The overlays of the results that show one, in order; all results can be shown, see `Result.problem`."""
    return tuple(_overlay(result) for result in results if result.shows_overlay)


def _statement(result: Result, style: Style) -> tuple[str, str]:
    """(text, the task or `failure`)."""
    annotation, wording = result.annotation, style.wording
    doubt = doubts(annotation.verdicts) if style.verdicts else ""
    if annotation.status == "failed":
        return wording.failure(annotation) + doubt, "failure"
    if result.task == "classification":
        return wording.classification(annotation, style.threshold) + doubt, result.task
    return wording.segmentation(annotation, result.plane) + doubt, result.task


def _overlay(result: Result) -> Overlay:
    axis, index = result.plane.axis, result.plane.index
    assert axis is not None and index is not None  # or it could not be shown
    return functools.partial(expert_overlay, result.annotation, axis=axis, index=index)


def with_cards(turns: Sequence[Turn], cards: Sequence[Card]) -> list[Turn]:
    """Puts the card list in front of the first user turn."""
    turns = list(turns)
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    turns[first] = dataclasses.replace(turns[first], text=render_cards(cards) + turns[first].text)
    return turns
