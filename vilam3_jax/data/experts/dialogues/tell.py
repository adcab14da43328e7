"""Results in the words of an answer, and questions that follow it.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

from collections.abc import Callable

from vilam3_jax.data.experts.brats_legend import brats_legend
from vilam3_jax.data.experts.dialogues.draft import Draft
from vilam3_jax.data.experts.dialogues.scene import Finding, Label, Scene
from vilam3_jax.data.experts.grammar import joined
from vilam3_jax.data.experts.wording import told_volume

MOST_NAMES = 12
_FOLLOW_UPS = (0, 1, 1, 2)  # how many, one drawn
_NEXT_VOLUME = 1.2  # a largest structure is this much larger than the next
_HEALTHY = ("normal", "no finding")


def nests(finding: Finding) -> bool:
    """Whether the regions of a result lie in each other, so that a colour alone is no region."""
    return finding.annotation.expert == "BRATS"


def legend_of(finding: Finding) -> str:
    """What the colours of nested regions mean."""
    return brats_legend({label.label_id: label.colour for label in finding.labels}, "correct")


def by_size(finding: Finding) -> list[Label]:
    """What is marked on the slice, largest first."""
    return sorted(finding.labels, key=lambda label: (-label.pixels, label.label_id))


def found_in(scene: Scene, finding: Finding) -> str:
    """What a result shows, '' for nothing: structures with their colours, or positive classes."""
    if not finding.segments:
        positive = scene.positives(finding)
        return joined(positive) if positive else ""
    if nests(finding):
        return legend_of(finding)
    labels = by_size(finding)
    if not labels:
        return ""
    parts = [f"{one.name} ({one.colour})" for one in labels[:MOST_NAMES]]
    if more := len(labels) - len(parts):
        parts.append(f"{more} smaller structure{'s' if more > 1 else ''}")
    return joined(parts)


def is_finding(name: str) -> bool:
    """Whether a class is something that one asks for on a film."""
    return name not in _HEALTHY


def follow_up(scene: Scene, draft: Draft, finding: Finding) -> None:
    """Adds up to two questions whose answers stand in what the expert said already; no call is made."""
    if not scene.spoken:
        return
    kinds = _about_labels(scene, finding) if finding.segments else _about_classes(scene, finding)
    for ask in scene.rng.sample(kinds, min(scene.rng.choice(_FOLLOW_UPS), len(kinds))):
        draft.exchange(*ask())


_Ask = Callable[[], tuple[str, str]]


def _about_labels(scene: Scene, finding: Finding) -> list[_Ask]:
    rng, labels = scene.rng, finding.labels
    figures = scene.setting.style.wording.tells_figures
    shown = {label.name for label in labels}
    colours = [label.colour for label in labels]
    clear = [label for label in labels if colours.count(label.colour) == 1]
    absent = sorted(set(finding.universe.values()) - shown)
    ordered = sorted(labels, key=lambda label: -label.ml)

    def colour() -> tuple[str, str]:
        one = rng.choice(clear)
        words = {"name": one.name, "colour": one.colour}
        pick = scene.pick
        return pick("follow_ups", "colour", **words), pick("follow_ups", "colour_answers", **words)

    def is_shown() -> tuple[str, str]:
        if clear and (not absent or rng.random() < 0.5):
            one = rng.choice(clear)
            answer = scene.pick("follow_ups", "shown_yes", name=one.name, colour=one.colour)
            return scene.pick("follow_ups", "shown", name=one.name), answer
        name = rng.choice(absent)
        question = scene.pick("follow_ups", "shown", name=name)
        return question, scene.pick("follow_ups", "shown_no", name=name)

    def volume() -> tuple[str, str]:
        one = rng.choice(labels)
        question = scene.pick("follow_ups", "volume", name=one.name)
        return question, scene.pick("follow_ups", "volume_answers", name=one.name, ml=told_volume(one.ml))

    def largest() -> tuple[str, str]:
        one = ordered[0]
        question = scene.pick("follow_ups", "largest")
        return question, scene.pick("follow_ups", "largest_answers", name=one.name, ml=told_volume(one.ml))

    kinds: list[_Ask] = []
    if figures and labels:
        kinds.append(volume)
    if nests(finding):
        return kinds
    if clear:
        kinds.append(colour)
    if clear or absent:
        kinds.append(is_shown)
    if figures and len(ordered) > 1 and ordered[0].ml >= _NEXT_VOLUME * ordered[1].ml:
        kinds.append(largest)
    return kinds


def _about_classes(scene: Scene, finding: Finding) -> list[_Ask]:
    told = scene.classes_of(finding)

    def one_class() -> tuple[str, str]:
        name = scene.rng.choice(sorted(told))
        kind = "class_yes" if told[name] > scene.setting.style.threshold else "class_no"
        return scene.pick("follow_ups", "class", name=name), scene.pick("follow_ups", kind, name=name)

    def positive() -> tuple[str, str]:
        question = scene.pick("follow_ups", "positive")
        names = scene.positives(finding)
        if not names:
            return question, scene.pick("follow_ups", "positive_none")
        return question, scene.pick("follow_ups", "positive_answers", names=joined(names))

    return [one_class, positive]
