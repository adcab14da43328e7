"""Dialogues that the reference lacks: no call where none is due, and results that are not to be trusted.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.dialogues.ct import lesion_question
from vilam3_jax.data.experts.dialogues.draft import Draft
from vilam3_jax.data.experts.dialogues.phrases import modality_of, with_article
from vilam3_jax.data.experts.dialogues.pools import pool
from vilam3_jax.data.experts.dialogues.scene import Finding, Scene, Unfit
from vilam3_jax.data.experts.dialogues.tell import found_in, is_finding, nests
from vilam3_jax.data.experts.grammar import joined
from vilam3_jax.data.experts.labels import is_lesion
from vilam3_jax.data.experts.wording import IMAGE_OF, told_class, told_volume

PLANES = ("sagittal", "coronal", "axial")
_OTHER = {"CT": "CT images", "MRI": "MRI images", "CXR": "chest films", "cell imaging": "cell images"}
_ALIKE = 1.5  # volumes with a greater ratio disagree


def topics(scene: Scene) -> list[str]:
    """What can be asked of any image without an expert."""
    known = ["knowledge"]
    if scene.modality in IMAGE_OF:
        known.append("modality")
    if scene.record.images[0].axis is not None:
        known.append("plane")
    return known


def no_expert(scene: Scene, topic: str, rule: str = "no_expert") -> Example:
    """A question that needs no expert, though there are some."""
    if topic == "knowledge":
        asked = scene.rng.choice(pool("negatives")["knowledge"])
        return Draft(scene).exchange(asked["question"], asked["answer"]).example(rule)
    axis = scene.record.images[0].axis
    plane = PLANES[axis] if axis is not None else ""
    words = {"plane": plane, "an_plane": with_article(plane), "a_kind": IMAGE_OF.get(scene.modality, "")}
    question, answer = scene.pick("negatives", topic), scene.pick("negatives", f"{topic}_answers", **words)
    return Draft(scene).exchange(question, answer).example(rule)


def tempting(scene: Scene) -> list[Card]:
    """Experts of other modalities."""
    if scene.modality not in IMAGE_OF:
        raise Unfit(f"modality {scene.modality!r} is none of {', '.join(IMAGE_OF)}")
    asked = pool("negatives")["wrong_modality"]
    own = [card for card in scene.setting.cards if modality_of(card.modality) == scene.modality]
    found = [c for c in scene.setting.cards if c not in own and modality_of(c.modality) in asked]
    if not found:
        raise Unfit(f"no card of another modality than {scene.modality}")
    return found


def wrong_modality(scene: Scene, card: Card) -> Example:
    """A question for an expert that does not read this modality: nobody is called."""
    other = modality_of(card.modality)
    words = {"a_kind": IMAGE_OF[scene.modality], "expert": card.name, "other": _OTHER[other]}
    kind = "wrong_modality_answers" if scene.spoken else "wrong_modality_alone"
    question = scene.pick("negatives", "wrong_modality", other)
    return Draft(scene).exchange(question, scene.pick("negatives", kind, **words)).example("wrong_modality")


def failures(scene: Scene) -> list[Finding]:
    """Experts that could not analyse this record."""
    found = [f for f in scene.findings if f.annotation.status == "failed"]
    if not found:
        raise Unfit("no expert failed")
    return found


def failed(scene: Scene, finding: Finding) -> Example:
    """The expert failed: the question stays open."""
    if not scene.spoken:
        return _without_experts(scene, "expert_failed")
    answer = scene.pick("negatives", "failed")
    return Draft(scene).exchange(_question(scene, finding), answer, [finding]).example("expert_failed")


def doubted_findings(scene: Scene) -> list[Finding]:
    """Results with doubts that the model is told of."""
    if not scene.setting.style.verdicts:
        raise Unfit("the model is not told of doubts (config model.expert_verdicts is off)")
    found = [f for f in scene.findings if f.ok and f.doubts]
    if not found:
        raise Unfit("no check doubts a result")
    return found


def doubted(scene: Scene, finding: Finding) -> Example:
    """Checks doubt the result: the answer passes the doubt on."""
    if not scene.spoken:
        return _without_experts(scene, "expert_doubted")
    found = found_in(scene, finding) or pool("negatives")["doubted_empty"]
    answer = scene.pick("negatives", "doubted", found=found, doubts="; ".join(finding.doubts))
    question = _question(scene, finding)
    return Draft(scene).exchange(question, answer, [finding]).example("expert_doubted")


@dataclasses.dataclass(frozen=True)
class Dispute:
    """Where two results differ.

    Attributes:
      first, second: the results, in the order of their cards.
      name: the subject as it is told.
      kind: `shown`, `volume`, `class` or `outline`.
      holds: 0 or 1: which of the two shows or affirms it.
    """

    first: Finding
    second: Finding
    name: str
    kind: str
    holds: int = 0


def disputes(scene: Scene) -> list[Dispute]:
    """Where two experts say different things of this image, as far as the model is told."""
    trusted = [f for f in scene.findings if f.ok and not scene.doubted(f)]
    found = []
    for first, second in itertools.combinations(trusted, 2):
        if first.card.name != second.card.name and first.segments == second.segments:
            differ = _labels_differ if first.segments else _classes_differ
            found += differ(scene, first, second)
    if not found:
        raise Unfit("no two experts disagree on what the image shows")
    return found


def disagree(scene: Scene, dispute: Dispute) -> Example:
    """Two experts are called and disagree: the answer says so and does not decide."""
    if not scene.spoken:
        return _without_experts(scene, "experts_disagree")
    pair = (dispute.first, dispute.second)
    words = {
        "name": dispute.name,
        "with_it": pair[dispute.holds].card.name,
        "without_it": pair[1 - dispute.holds].card.name,
        "first": pair[0].card.name,
        "second": pair[1].card.name,
    }
    if dispute.kind == "volume":
        words |= {
            f"{n}_ml": told_volume(_ml(f, dispute.name))
            for n, f in zip(("first", "second"), pair, strict=True)
        }
    answer = scene.pick("negatives", f"disagree_{dispute.kind}", **words)
    question = scene.pick("negatives", "disagree_questions", name=dispute.name)
    return Draft(scene).exchange(question, answer, pair).example("experts_disagree")


def _labels_differ(scene: Scene, first: Finding, second: Finding) -> list[Dispute]:
    least = scene.setting.min_pixels
    figures = scene.setting.style.wording.tells_figures
    seen = [{label.name: label for label in f.labels} for f in (first, second)]
    reported = {told_class(d.subject) for d in _reported(first, second)}
    found = []
    for name in sorted(set(first.universe.values()) & set(second.universe.values())):
        one, two = (labels.get(name) for labels in seen)
        if (one is None) != (two is None):
            shown = one or two
            if shown is not None and shown.pixels >= least:
                found.append(Dispute(first, second, name, "shown", 0 if two is None else 1))
        elif one is not None and two is not None:
            low, high = sorted((one.ml, two.ml))
            if figures and high > _ALIKE * low and told_volume(high) != told_volume(low):
                found.append(Dispute(first, second, name, "volume"))
            elif told_class(name) in reported and min(one.pixels, two.pixels) >= least:
                found.append(Dispute(first, second, name, "outline"))
    return found


def _classes_differ(scene: Scene, first: Finding, second: Finding) -> list[Dispute]:
    one, two = scene.classes_of(first), scene.classes_of(second)
    return [
        Dispute(first, second, name, "class", 0 if one[name] > scene.setting.style.threshold else 1)
        for name in one
        if name in two
        and is_finding(name)
        and (one[name] > scene.setting.style.threshold) != (two[name] > scene.setting.style.threshold)
    ]


def _reported(first: Finding, second: Finding) -> list:
    """What either record says of the other."""
    return [
        d
        for here, there in ((first, second), (second, first))
        for d in here.annotation.disagreements
        if (d.expert, d.args) == (there.card.name, there.args)
    ]


def _ml(finding: Finding, name: str) -> float:
    return next(label.ml for label in finding.labels if label.name == name)


def several_findings(scene: Scene) -> list[tuple[Finding, ...]]:
    """Pairs of results that one question can ask for."""
    parts = pool("negatives")["parts"]
    found = scene.usable("a segmentation expert", lambda f: f.segments and f.args in parts)
    found = [f for f in found if f.args != "everything"]
    pairs = [pair for pair in itertools.combinations(found, 2) if pair[0].args != pair[1].args]
    if not pairs:
        raise Unfit("no two results that one question can ask for")
    return pairs


def several_calls(scene: Scene, called: Sequence[Finding]) -> Example:
    """One question, several calls in one turn."""
    if not scene.spoken:
        return _without_experts(scene, "several_calls")
    parts = pool("negatives")["parts"]
    called = scene.rng.sample(list(called), len(called))
    asked = joined([parts[f.args] for f in called])
    nothing = pool("negatives")["doubted_empty"]
    results = "; ".join(f"{f.card.name}({f.args}) shows {found_in(scene, f) or nothing}" for f in called)
    answer = scene.pick("negatives", "several_answers", results=results)
    question = scene.pick("negatives", "several", parts=asked)
    return Draft(scene).exchange(question, answer, called).example("several_calls")


def _without_experts(scene: Scene, rule: str) -> Example:
    """What such a rule asks with experts off: its own question cannot be answered then."""
    return no_expert(scene, scene.rng.choice(topics(scene)), rule)


def _question(scene: Scene, finding: Finding) -> str:
    """What a user asks who gets this expert called."""
    if not finding.segments:
        return scene.pick("films", "findings")
    if nests(finding):
        return scene.pick("brain", "segment")
    if is_lesion(finding.args):
        return lesion_question(scene, finding.args, finding.args)
    group = pool("groups").get(finding.args)
    return scene.rng.choice(group)["question"] if group else scene.pick("what", "questions")
