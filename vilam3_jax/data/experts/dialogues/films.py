"""Dialogues about chest films: a record's own questions, and single findings."""

from __future__ import annotations

import dataclasses

from vilam3_jax.data.examples import Example, ExpertRequest
from vilam3_jax.data.experts.dialogues.draft import dialogue, is_finding
from vilam3_jax.data.experts.dialogues.scene import Scene, StoredResult, Unfit
from vilam3_jax.data.experts.wording import question_of

_MIN_MARGIN = 0.1  # distance of a probability to the threshold from which on a finding is clear


def classifications(scene: Scene) -> list[StoredResult]:
    """Results of film classifiers."""
    return scene.usable("a film classifier", lambda r: not r.is_segmentation)


def own_questions(scene: Scene) -> list[StoredResult]:
    """The `classifications` with the most classes, for a record with questions and answers."""
    record = scene.record
    if record.format != "conversation":
        raise Unfit(f"is a {record.format}, not a conversation with its own questions")
    if len(record.images) != 1:
        raise Unfit(f"has {len(record.images)} images, not one film")
    found = classifications(scene)
    most = max(len(r.annotation.probabilities) for r in found)
    return [r for r in found if len(r.annotation.probabilities) == most]


def cxr(scene: Scene, result: StoredResult) -> Example:
    """The record's own questions; the expert is called after the first one."""
    record = scene.record
    before = next(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
    requests: tuple[ExpertRequest, ...] = ()
    if scene.experts_on:
        question = question_of(record.turns[before - 1].text)
        name = result.card.name
        requests = (ExpertRequest(name, result.args, result.images, before, "always", question),)
    meta = {**record.meta, "rule": "cxr"}
    return dataclasses.replace(record, id=f"{record.id}:cxr", expert_requests=requests, meta=meta)


def clear_findings(scene: Scene) -> list[tuple[StoredResult, str]]:
    """(result, class) pairs of clearly present or absent findings that no other result contradicts."""
    results = classifications(scene)
    opinions: dict[str, set[bool]] = {}
    for result in results:
        for name, p in scene.classes_of(result).items():
            opinions.setdefault(name, set()).add(scene.is_positive(p))
    found = [
        (result, name)
        for result in results
        for name, p in scene.classes_of(result).items()
        if abs(p - scene.setting.style.threshold) >= _MIN_MARGIN
        and is_finding(name)
        and len(opinions[name]) == 1
    ]
    if not found:
        raise Unfit("no class is clearly there or not")
    return found


def one_finding(scene: Scene, choice: tuple[StoredResult, str]) -> Example:
    """Does this film show one finding?"""
    result, name = choice
    kind = "yes" if scene.is_positive(scene.classes_of(result)[name]) else "no"
    answer = scene.pick("films", kind, name=name)
    question = scene.pick("films", "finding", name=name)
    return dialogue(scene, result, "cxr_finding", question, answer, finding=name)
