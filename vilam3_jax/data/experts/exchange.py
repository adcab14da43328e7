"""The exchange with experts: turns their results into a turn of text and its overlays.

Training (`data/render.py`, from stored examples) and inference (`inference/agent.py`, from live dialogues)
share it, so a model sees the same tokens in both.
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
from vilam3_jax.data.experts.wording import MAX_EXPERT_TEXT, PLAIN, Plane, Wording, doubts, wording_named
from vilam3_jax.errors import UserError

TASKS = ("segmentation", "classification")
_MAX_NAMES = 6000  # characters of all names of a result; VISTA3D's 132 labels have 1,721

Overlay = Callable[[np.ndarray], np.ndarray]
"""Draws coloured labels onto a slice as the model sees it, uint8 [H, W, 3]."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How experts' results are presented to a model."""

    wording: Wording = PLAIN  # the sentences
    verdicts: bool = False  # whether doubts of the checks are included
    threshold: float = THRESHOLD  # a class with a higher probability is reported as present

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Style:
        """The style of a `model` section; raises `UserError` for an unknown wording or a bad threshold."""
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
    """An expert's result and the slice on which it is shown."""

    annotation: Annotation  # the result; a failed one is rendered as a sentence
    task: str  # `segmentation` or `classification`, as on the expert's card
    plane: Plane = dataclasses.field(default_factory=Plane)  # the slice

    @property
    def shows_overlay(self) -> bool:
        """Whether the expert's turn shows an overlay for this result."""
        return self.task == "segmentation" and self.annotation.status == "ok"

    def problem(self) -> str | None:
        """The reason why this result cannot be shown, or None."""
        found = self.annotation
        if found.status == "failed":
            return None
        if self.task not in TASKS:
            return f"task {self.task!r} of {found.expert} is not supported; use one of {', '.join(TASKS)}"
        names = {*found.probabilities, *found.calibrated, *(segment.name for segment in found.segments)}
        if (size := sum(min(len(name), MAX_EXPERT_TEXT) for name in names)) > _MAX_NAMES:
            return f"annotation of {found.expert} has names of {size} characters, more than {_MAX_NAMES}"
        if self.task == "classification":
            return None if found.probabilities else f"annotation of {found.expert} has no probabilities"
        if found.label_shape is None:
            return f"annotation of {found.expert} has no label map"
        if self.plane.axis is None or self.plane.index is None:
            return f"annotation of {found.expert} is of a volume, and the image is not a slice of one"
        planes = found.label_shape[self.plane.axis]
        if not 0 <= self.plane.index < planes:
            return f"slice {self.plane.index} of axis {self.plane.axis}, which has {planes}"
        return None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The experts' turn."""

    text: str  # the results, followed by the question
    overlays: tuple[Overlay, ...]  # one per image marker in `text`, in order


def call_turn(cards: Sequence[Card], calls: Sequence[Call], style: Style = DEFAULT_STYLE) -> Turn:
    """The assistant's turn, a target, that makes `calls` to the experts of `cards`, one for each call."""
    return Turn("assistant", style.wording.call(cards, calls), supervised=True)


def exchange(results: Sequence[Result], question: str, style: Style = DEFAULT_STYLE) -> Exchange:
    """Renders the experts' turn: the results of all calls of a turn, at least one, and the question again.

    The question has no image markers. Raises `ValueError` for a result with a `Result.problem`.
    """
    texts, tasks = [], []
    for result in results:
        if problem := result.problem():
            raise ValueError(problem)
        text, task = _statement(result, style)
        if len(results) > 1:
            text = f"{Call(result.annotation.expert, result.annotation.args)} {text}".rstrip() + "\n"
        texts.append(text)
        tasks.append(task)
    return Exchange("".join(texts) + style.wording.question(question, tasks), overlays_of(results))


def overlays_of(results: Sequence[Result]) -> tuple[Overlay, ...]:
    """The overlays of the results that show one, in order. `Result.problem` must be None for all results."""
    drawn = []
    for result in results:
        if result.shows_overlay:
            axis, index = result.plane.axis, result.plane.index
            assert axis is not None and index is not None  # see Result.problem
            drawn.append(functools.partial(expert_overlay, result.annotation, axis=axis, index=index))
    return tuple(drawn)


def _statement(result: Result, style: Style) -> tuple[str, str]:
    """(text of a result, its task or `failure`)."""
    annotation, wording = result.annotation, style.wording
    doubt = doubts(annotation.verdicts) if style.verdicts else ""
    if annotation.status == "failed":
        return wording.failure(annotation) + doubt, "failure"
    if result.task == "classification":
        return wording.classification(annotation, style.threshold) + doubt, result.task
    return wording.segmentation(annotation, result.plane) + doubt, result.task


def with_cards(turns: Sequence[Turn], cards: Sequence[Card]) -> list[Turn]:
    """Prepends the card list to the first user turn."""
    turns = list(turns)
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    turns[first] = dataclasses.replace(turns[first], text=render_cards(cards) + turns[first].text)
    return turns
