"""Dialogues beyond the reference: questions without a call, and results that are not to be trusted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.dialogues.ct import lesion_question
from vilam3_jax.data.experts.dialogues.draft import Draft, describe, has_nested_regions, is_finding
from vilam3_jax.data.experts.dialogues.phrases import modality_of, pool, with_article
from vilam3_jax.data.experts.dialogues.scene import Scene, StoredResult, Unfit
from vilam3_jax.data.experts.grammar import joined
from vilam3_jax.data.experts.labels import is_lesion
from vilam3_jax.data.experts.wording import IMAGE_OF, class_name, format_ml

_PLANES = ("sagittal", "coronal", "axial")
_IMAGES_OF = {"CT": "CT images", "MRI": "MRI images", "CXR": "chest films", "cell imaging": "cell images"}
_MAX_VOLUME_RATIO = 1.5  # volumes with a greater ratio disagree


def topics(scene: Scene) -> list[str]:
    """Topics of questions about any image that need no expert."""
    known = ["knowledge"]
    if scene.modality in IMAGE_OF:
        known.append("modality")
    if scene.record.images[0].axis is not None:
        known.append("plane")
    return known


def no_expert(scene: Scene, topic: str, rule: str = "no_expert") -> Example:
    """A question that needs no expert, although experts are available."""
    if topic == "knowledge":
        asked = scene.rng.choice(pool("negatives")["knowledge"])
        return Draft(scene).add(asked["question"], asked["answer"]).example(rule)
    axis = scene.record.images[0].axis
    plane = _PLANES[axis] if axis is not None else ""
    words = {"plane": plane, "an_plane": with_article(plane), "a_kind": IMAGE_OF.get(scene.modality, "")}
    question, answer = scene.pick("negatives", topic), scene.pick("negatives", f"{topic}_answers", **words)
    return Draft(scene).add(question, answer).example(rule)


def other_modality_cards(scene: Scene) -> list[Card]:
    """Cards of experts of other modalities."""
    if scene.modality not in IMAGE_OF:
        raise Unfit(f"modality {scene.modality!r} is none of {', '.join(IMAGE_OF)}")
    asked = pool("negatives")["wrong_modality"]
    others = ((card, modality_of(card.modality)) for card in scene.setting.cards)
    found = [card for card, modality in others if modality != scene.modality and modality in asked]
    if not found:
        raise Unfit(f"no card of another modality than {scene.modality}")
    return found


def wrong_modality(scene: Scene, card: Card) -> Example:
    """A question for an expert that does not support this modality: there is no call."""
    other = modality_of(card.modality)
    words = {"a_kind": IMAGE_OF[scene.modality], "expert": card.name, "other": _IMAGES_OF[other]}
    kind = "wrong_modality_answers" if scene.experts_on else "wrong_modality_alone"
    question = scene.pick("negatives", "wrong_modality", other)
    return Draft(scene).add(question, scene.pick("negatives", kind, **words)).example("wrong_modality")


def failures(scene: Scene) -> list[StoredResult]:
    """Failed annotations of the record."""
    found = [r for r in scene.results if r.annotation.status == "failed"]
    if not found:
        raise Unfit("no expert failed")
    return found


def failed(scene: Scene, result: StoredResult) -> Example:
    """The expert fails and the question remains unanswered."""
    answer = scene.pick("negatives", "failed")
    return Draft(scene).add(_question(scene, result), answer, [result]).example("expert_failed")


def doubted_results(scene: Scene) -> list[StoredResult]:
    """Results with doubts that the model is told of."""
    if not scene.setting.style.verdicts:
        raise Unfit("the model is not told of doubts (config model.expert_verdicts is off)")
    found = [r for r in scene.results if r.ok and r.doubts]
    if not found:
        raise Unfit("no check doubts a result")
    return found


def doubted(scene: Scene, result: StoredResult) -> Example:
    """Checks doubt the result, and the answer says so."""
    found = describe(scene, result) or pool("negatives")["doubted_empty"]
    answer = scene.pick("negatives", "doubted", found=found, doubts="; ".join(result.doubts))
    question = _question(scene, result)
    return Draft(scene).add(question, answer, [result]).example("expert_doubted")


@dataclasses.dataclass(frozen=True)
class Conflict:
    """A contradiction between two results, in the order of their cards."""

    first: StoredResult
    second: StoredResult
    name: str  # of the label or class
    kind: str  # `shown`, `volume`, `class` or `outline`
    affirming: int = 0  # index of the result that shows or affirms it


def conflicts(scene: Scene) -> list[Conflict]:
    """Contradictions between experts about this image, as far as the model can see them."""
    trusted = [r for r in scene.results if r.ok and not scene.is_doubted(r)]
    found = []
    for first, second in itertools.combinations(trusted, 2):
        if first.card.name != second.card.name and first.is_segmentation == second.is_segmentation:
            compare = _label_conflicts if first.is_segmentation else _class_conflicts
            found += compare(scene, first, second)
    if not found:
        raise Unfit("no two experts disagree on what the image shows")
    return found


def disagree(scene: Scene, conflict: Conflict) -> Example:
    """Two experts are called and disagree: the answer reports both and does not decide."""
    pair = (conflict.first, conflict.second)
    words = {
        "name": conflict.name,
        "with_it": pair[conflict.affirming].card.name,
        "without_it": pair[1 - conflict.affirming].card.name,
        "first": pair[0].card.name,
        "second": pair[1].card.name,
    }
    if conflict.kind == "volume":
        for name, result in zip(("first_ml", "second_ml"), pair, strict=True):
            words[name] = format_ml(next(one.ml for one in result.labels if one.name == conflict.name))
    answer = scene.pick("negatives", f"disagree_{conflict.kind}", **words)
    question = scene.pick("negatives", "disagree_questions", name=conflict.name)
    return Draft(scene).add(question, answer, pair).example("experts_disagree")


def _label_conflicts(scene: Scene, first: StoredResult, second: StoredResult) -> list[Conflict]:
    min_pixels = scene.setting.min_pixels
    measured = scene.setting.style.wording.reports_measurements
    shown = [{label.name: label for label in r.labels} for r in (first, second)]
    recorded = {
        class_name(d.subject)
        for r, other in ((first, second), (second, first))
        for d in r.annotation.disagreements
        if (d.expert, d.args) == (other.card.name, other.args)
    }
    found = []
    for name in sorted(set(first.universe.values()) & set(second.universe.values())):
        one, two = (labels.get(name) for labels in shown)
        if one is not None and two is not None:
            low, high = sorted((one.ml, two.ml))
            if measured and high > _MAX_VOLUME_RATIO * low and format_ml(high) != format_ml(low):
                found.append(Conflict(first, second, name, "volume"))
            elif class_name(name) in recorded and min(one.pixels, two.pixels) >= min_pixels:
                found.append(Conflict(first, second, name, "outline"))
        elif (label := one or two) is not None and label.pixels >= min_pixels:
            found.append(Conflict(first, second, name, "shown", 0 if two is None else 1))
    return found


def _class_conflicts(scene: Scene, first: StoredResult, second: StoredResult) -> list[Conflict]:
    one, two = (
        {name: scene.is_positive(p) for name, p in scene.classes_of(r).items()} for r in (first, second)
    )
    return [
        Conflict(first, second, name, "class", 0 if one[name] else 1)
        for name in one
        if name in two and is_finding(name) and one[name] != two[name]
    ]


def result_pairs(scene: Scene) -> list[tuple[StoredResult, ...]]:
    """Pairs of results that one question can ask for."""
    parts = pool("negatives")["parts"]
    found = scene.usable("a segmentation expert", lambda r: r.is_segmentation and r.args in parts)
    found = [r for r in found if r.args != "everything"]
    pairs = [pair for pair in itertools.combinations(found, 2) if pair[0].args != pair[1].args]
    if not pairs:
        raise Unfit("no two results that one question can ask for")
    return pairs


def several_calls(scene: Scene, called: Sequence[StoredResult]) -> Example:
    """One question with several calls in one turn."""
    parts = pool("negatives")["parts"]
    called = scene.rng.sample(list(called), len(called))
    asked = joined([parts[r.args] for r in called])
    nothing = pool("negatives")["doubted_empty"]
    results = "; ".join(f"{r.card.name}({r.args}) shows {describe(scene, r) or nothing}" for r in called)
    answer = scene.pick("negatives", "several_answers", results=results)
    question = scene.pick("negatives", "several", parts=asked)
    return Draft(scene).add(question, answer, called).example("several_calls")


def _question(scene: Scene, result: StoredResult) -> str:
    """A user's question that calls for this expert."""
    if not result.is_segmentation:
        return scene.pick("films", "findings")
    if has_nested_regions(result):
        return scene.pick("brain", "segment")
    if is_lesion(result.args):
        return lesion_question(scene, result.args, result.args)
    group = pool("groups").get(result.args)
    return scene.rng.choice(group)["question"] if group else scene.pick("what", "questions")
