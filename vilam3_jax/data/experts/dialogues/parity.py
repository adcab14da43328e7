"""The reference's own sentences, slips included (`m3/data_prepare/experts`).

The questions come from this project's pools; what stands here is what the reference writes into every
dialogue of a kind. Where its samples cannot be loaded (an overlay that is named but missing, five images for
one marker), the images are those that the text names.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses

from vilam3_jax.data.examples import IMAGE_MARKER, Example
from vilam3_jax.data.experts.dialogues import ct, films
from vilam3_jax.data.experts.dialogues.draft import Draft
from vilam3_jax.data.experts.dialogues.pools import pool
from vilam3_jax.data.experts.dialogues.scene import Finding, Scene
from vilam3_jax.data.experts.overlays import legend

_CT = f" {IMAGE_MARKER}This is a CT image.\n"
_FILM = f"{IMAGE_MARKER} This is a CXR image.\n"
_GRADES = {"LGG": "The scan indicates lower grade glioma.", "HGG": "The scan indicates high grade glioma."}
_OBJECTS = {"everything": "the entire image"}


def tumor(scene: Scene, finding: Finding) -> Example:
    """`yes` or `no`, then the count, joined by blanks and with an `s` as the reference puts it."""
    lesions = finding.lesions()
    marked = [label for label in finding.labels if label.label_id in lesions]
    question = ct.lesion_question(scene, finding.args, next(iter(lesions.values())))
    draft = Draft(scene).verbatim(
        _CT + question, "yes" if marked else "no", [finding], question, _ct_call(finding)
    )
    if marked:
        plain = {"lesion": "tumor", "plural": "tumors"}
        counts = " ".join(_counted(finding.parts(label), label.name) for label in marked)
        draft.exchange(scene.pick("counts", "questions", **plain), counts)
    return draft.example("ct_tumor", tumor=bool(marked))


def segment(scene: Scene, finding: Finding) -> Example:
    """The call is the whole answer; no expert speaks."""
    groups = pool("groups")
    question = scene.rng.choice(groups.get(finding.args, groups["everything"]))["question"]
    marked = _OBJECTS.get(finding.args, f"the {finding.args}")
    answer = f"I segmented {marked} using <{finding.card.name}({finding.args})>."
    return Draft(scene).verbatim(_CT + question, answer).example("ct_segment")


def what(scene: Scene, finding: Finding) -> Example:
    """The legend, said twice."""
    names = {label.label_id: label.name for label in finding.labels}
    colours = ", ".join(f"{colour}: {name}" for colour, name in legend(names, list(names)).items())
    question = scene.pick("what", "questions")
    answer = (
        "This a CT image. It contains several anatomical structures such as identified by VISTA3D: "
        f"{colours}."
    )
    draft = Draft(scene).verbatim(_CT + question, answer, [finding], question, _ct_call(finding))
    return draft.example("ct_what")


def brain_what(scene: Scene, finding: Finding) -> Example:
    """No cards, no call, and of five images the one that the marker takes."""
    del finding
    draft = Draft(scene).verbatim(f"{IMAGE_MARKER}\n" + scene.pick("what", "questions"), _BRAIN)
    return dataclasses.replace(draft.example("mri_what", cards=False), images=scene.record.images[:1])


_BRAIN = "This is a brain MRI scan."


def brain_grade(scene: Scene, finding: Finding) -> Example:
    """One question for all."""
    question = "What glioma grade is shown in the image?"
    answer = _GRADES[scene.record.meta["grade"]]
    return Draft(scene).verbatim(scene.shown + question, answer, [finding], question).example("mri_grade")


def brain_segment(scene: Scene, finding: Finding) -> Example:
    """The call stands in a sentence that says it is done."""
    question = "Segment any tumors in the image"
    call = f"I segmented any brain tumors using <{finding.card.name}({finding.args})>."
    draft = Draft(scene).verbatim(
        scene.shown + question, "All tumors were segmented", [finding], question, call
    )
    return draft.example("mri_segment")


def cxr(scene: Scene, finding: Finding) -> Example:
    """The record's own turns after a fixed beginning."""
    example = films.cxr(scene, finding)
    request = example.expert_requests[0]
    turns = list(example.turns)
    user = turns[request.before_turn - 1]
    turns[request.before_turn - 1] = dataclasses.replace(user, text=_FILM + request.question)
    return dataclasses.replace(example, turns=tuple(turns))


def _ct_call(finding: Finding) -> str:
    return f"This looks like a CT image. Let me trigger <{finding.card.name}({finding.args})>. "


def _counted(count: int, name: str) -> str:
    s = "s" if count > 1 and not name.endswith("s") else ""
    return f"There are {count} {name}{s}."
