"""Dialogues about chest films: a record's own questions, and single findings.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses

from vilam3_jax.data.examples import Example, ExpertRequest
from vilam3_jax.data.experts.dialogues.draft import Draft
from vilam3_jax.data.experts.dialogues.scene import Finding, Scene, Unfit
from vilam3_jax.data.experts.dialogues.tell import follow_up, is_finding
from vilam3_jax.data.experts.wording import question_of

_CLEAR = 0.1  # how far a probability is off the threshold where a finding is asked for


def classifications(scene: Scene) -> list[Finding]:
    """Results of film classifiers."""
    return scene.usable("a film classifier", lambda f: not f.segments)


def own_questions(scene: Scene) -> list[Finding]:
    """`classifications` of a record that brings its questions and answers."""
    record = scene.record
    if record.format != "conversation":
        raise Unfit(f"is a {record.format}, no conversation with questions of its own")
    if len(record.images) != 1:
        raise Unfit(f"has {len(record.images)} images, not one film")
    found = classifications(scene)
    most = max(len(f.annotation.probabilities) for f in found)
    return [f for f in found if len(f.annotation.probabilities) == most]


def cxr(scene: Scene, finding: Finding) -> Example:
    """The record's own questions; the first one calls."""
    record = scene.record
    before = next(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
    requests: tuple[ExpertRequest, ...] = ()
    if scene.spoken:
        question = question_of(record.turns[before - 1].text)
        card = finding.card.name
        requests = (ExpertRequest(card, finding.args, finding.images, before, "always", question),)
    meta = {**record.meta, "rule": "cxr"}
    return dataclasses.replace(record, id=f"{record.id}:cxr", expert_requests=requests, meta=meta)


def clear_findings(scene: Scene) -> list[tuple[Finding, str]]:
    """(result, class) of the classes that are clearly there or not, and that no other result denies."""
    results = classifications(scene)
    said: dict[str, set[bool]] = {}
    for finding in results:
        for name, p in scene.classes_of(finding).items():
            said.setdefault(name, set()).add(p > scene.setting.style.threshold)
    found = [
        (finding, name)
        for finding in results
        for name, p in scene.classes_of(finding).items()
        if abs(p - scene.setting.style.threshold) >= _CLEAR and is_finding(name) and len(said[name]) == 1
    ]
    if not found:
        raise Unfit("no class is clearly there or not")
    return found


def one_finding(scene: Scene, choice: tuple[Finding, str]) -> Example:
    """Does this film show one finding?"""
    finding, name = choice
    there = scene.classes_of(finding)[name] > scene.setting.style.threshold
    answer = scene.pick("films", "yes" if there else "no", name=name)
    draft = Draft(scene).exchange(scene.pick("films", "finding", name=name), answer, [finding])
    follow_up(scene, draft, finding)
    return draft.example("cxr_finding", finding=name)
