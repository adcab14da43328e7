"""Drafts of dialogues: turns, answers that describe results, and follow-up questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from vilam3_jax.data.examples import Example, ExpertRequest, Turn
from vilam3_jax.data.experts.dialogues.scene import Label, Scene, StoredResult
from vilam3_jax.data.experts.grammar import joined
from vilam3_jax.data.experts.overlays import brats_legend
from vilam3_jax.data.experts.wording import format_ml

MAX_NAMES = 12
_FOLLOW_UPS = (0, 1, 1, 2)  # number of follow-ups, one drawn
_LARGEST_RATIO = 1.2  # minimum volume ratio of the largest structure to the next
_HEALTHY = ("normal", "no finding")


class Draft:
    """Collects the turns and expert requests of a dialogue; `example` returns the result."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._turns: list[Turn] = []
        self._requests: list[ExpertRequest] = []

    def add(self, question: str, answer: str, called: Sequence[StoredResult] = ()) -> Draft:
        """Adds a question and its answer, a target, with calls for the results `called` between the two.

        Image markers are put before the first question. With experts off, there are no calls.
        """
        markers = "" if self._turns else self._scene.markers
        return self.add_verbatim(markers + question, answer, called, question)

    def add_verbatim(
        self, user: str, answer: str, called: Sequence[StoredResult] = (), question: str = "", call: str = ""
    ) -> Draft:
        """`add` with the text of the user turn, including image markers.

        `question` is what the expert's turn repeats, `call` the calling turn; '' for that of the style.
        """
        before = len(self._turns) + 1
        if self._scene.experts_on:
            self._requests += [
                ExpertRequest(r.card.name, r.args, r.images, before, "always", question, call) for r in called
            ]
        self._turns += [Turn("user", user), Turn("assistant", answer, True)]
        return self

    def example(self, rule: str, **meta: object) -> Example:
        """Returns the dialogue as an example; `rule` becomes part of the id, `meta` extends the record's."""
        record = self._scene.record
        return dataclasses.replace(
            record,
            id=f"{record.id}:{rule}",
            format="conversation",
            turns=tuple(self._turns),
            expert_requests=tuple(self._requests),
            meta={**record.meta, "rule": rule, **meta},
        )


def has_nested_regions(result: StoredResult) -> bool:
    """Whether regions are unions of labels, so that a single colour is not a region."""
    return result.annotation.expert == "BRATS"


def nested_legend(result: StoredResult) -> str:
    """The legend of nested regions."""
    return brats_legend({label.label_id: label.colour for label in result.labels})


def by_size(result: StoredResult) -> list[Label]:
    """The labels on the slice, largest first."""
    return sorted(result.labels, key=lambda label: (-label.pixels, label.label_id))


def describe(scene: Scene, result: StoredResult) -> str:
    """Structures with their colours, or positive classes; '' for none."""
    if not result.is_segmentation:
        positive = scene.positives(result)
        return joined(positive) if positive else ""
    if has_nested_regions(result):
        return nested_legend(result)
    labels = by_size(result)
    if not labels:
        return ""
    parts = [f"{label.name} ({label.colour})" for label in labels[:MAX_NAMES]]
    if more := len(labels) - len(parts):
        parts.append(f"{more} smaller structure{'s' if more > 1 else ''}")
    return joined(parts)


def is_finding(name: str) -> bool:
    """Whether a class is a radiological finding."""
    return name not in _HEALTHY


def dialogue(
    scene: Scene, result: StoredResult, rule: str, question: str, answer: str, **meta: object
) -> Example:
    """A question with a call, its answer, and follow-up questions."""
    draft = Draft(scene).add(question, answer, [result])
    add_follow_ups(scene, draft, result)
    return draft.example(rule, **meta)


def add_follow_ups(scene: Scene, draft: Draft, result: StoredResult) -> None:
    """Adds up to two questions that the expert's turn already answers, without another call."""
    if not scene.experts_on:
        return
    kinds = (_label_questions if result.is_segmentation else _class_questions)(scene, result)
    for ask in scene.rng.sample(kinds, min(scene.rng.choice(_FOLLOW_UPS), len(kinds))):
        draft.add(*ask())


_Ask = Callable[[], tuple[str, str]]
"""Draws a question and its answer."""


def _label_questions(scene: Scene, result: StoredResult) -> list[_Ask]:
    rng, labels = scene.rng, result.labels
    measured = scene.setting.style.wording.reports_measurements
    colours = [label.colour for label in labels]
    clear = [label for label in labels if colours.count(label.colour) == 1]
    absent = sorted(set(result.universe.values()) - {label.name for label in labels})
    ordered = sorted(labels, key=lambda label: -label.ml)

    def pick(kind: str, label: Label) -> str:
        words = {"name": label.name, "colour": label.colour, "ml": format_ml(label.ml)}
        return scene.pick("follow_ups", kind, **words)

    def colour() -> tuple[str, str]:
        label = rng.choice(clear)
        return pick("colour", label), pick("colour_answers", label)

    def is_shown() -> tuple[str, str]:
        if clear and (not absent or rng.random() < 0.5):
            label = rng.choice(clear)
            answer = pick("shown_yes", label)
            return pick("shown", label), answer
        name = rng.choice(absent)
        question = scene.pick("follow_ups", "shown", name=name)
        return question, scene.pick("follow_ups", "shown_no", name=name)

    def volume() -> tuple[str, str]:
        label = rng.choice(labels)
        return pick("volume", label), pick("volume_answers", label)

    def largest() -> tuple[str, str]:
        return pick("largest", ordered[0]), pick("largest_answers", ordered[0])

    kinds: list[_Ask] = []
    if measured and labels:
        kinds.append(volume)
    if has_nested_regions(result):
        return kinds
    if clear:
        kinds.append(colour)
    if clear or absent:
        kinds.append(is_shown)
    if measured and len(ordered) > 1 and ordered[0].ml >= _LARGEST_RATIO * ordered[1].ml:
        kinds.append(largest)
    return kinds


def _class_questions(scene: Scene, result: StoredResult) -> list[_Ask]:
    classes = scene.classes_of(result)

    def one_class() -> tuple[str, str]:
        name = scene.rng.choice(sorted(classes))
        kind = "class_yes" if scene.is_positive(classes[name]) else "class_no"
        return scene.pick("follow_ups", "class", name=name), scene.pick("follow_ups", kind, name=name)

    def positive() -> tuple[str, str]:
        question = scene.pick("follow_ups", "positive")
        names = scene.positives(result)
        if not names:
            return question, scene.pick("follow_ups", "positive_none")
        return question, scene.pick("follow_ups", "positive_answers", names=joined(names))

    return [one_class, positive]
