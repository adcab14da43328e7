"""The reference's own sentences, mistakes included (`m3/data_prepare/experts`).

The questions come from this project's pools. This module holds the sentences that the reference puts into
every dialogue of a kind. Where its samples cannot be loaded (a named but missing overlay, five images for one
marker), the images are those that the text refers to.
"""

from __future__ import annotations

import dataclasses

from vilam3_jax.data.examples import IMAGE_MARKER, Example
from vilam3_jax.data.experts.dialogues import ct, films
from vilam3_jax.data.experts.dialogues.draft import Draft
from vilam3_jax.data.experts.dialogues.phrases import pool
from vilam3_jax.data.experts.dialogues.scene import Scene, StoredResult
from vilam3_jax.data.experts.overlays import legend

_CT = f" {IMAGE_MARKER}This is a CT image.\n"
_FILM = f"{IMAGE_MARKER} This is a CXR image.\n"
_GRADES = {"LGG": "The scan indicates lower grade glioma.", "HGG": "The scan indicates high grade glioma."}


def tumor(scene: Scene, result: StoredResult) -> Example:
    """`yes` or `no`, then the counts, joined by blanks, with the reference's plural `s`."""
    lesions = result.lesions()
    marked = [label for label in result.labels if label.label_id in lesions]
    question = ct.lesion_question(scene, result.args, next(iter(lesions.values())))
    draft = Draft(scene).add_verbatim(
        _CT + question, "yes" if marked else "no", [result], question, _ct_call(result)
    )
    if marked:
        question = scene.pick("counts", "questions", lesion="tumor", plural="tumors")
        counts = [(result.components(label), label.name) for label in marked]
        plurals = (f"{n} {name}{'s' * (n > 1 and not name.endswith('s'))}" for n, name in counts)
        draft.add(question, " ".join(f"There are {text}." for text in plurals))
    return draft.example("ct_tumor", tumor=bool(marked))


def segment(scene: Scene, result: StoredResult) -> Example:
    """The call is the whole answer; there is no expert turn."""
    groups = pool("groups")
    question = scene.rng.choice(groups.get(result.args, groups["everything"]))["question"]
    what = "entire image" if result.args == "everything" else result.args
    answer = f"I segmented the {what} using <{result.card.name}({result.args})>."
    return Draft(scene).add_verbatim(_CT + question, answer).example("ct_segment")


def what(scene: Scene, result: StoredResult) -> Example:
    """The legend, repeated in the answer."""
    names = {label.label_id: label.name for label in result.labels}
    colours = ", ".join(f"{colour}: {name}" for colour, name in legend(names, list(names)).items())
    question = scene.pick("what", "questions")
    answer = (
        "This a CT image. It contains several anatomical structures such as identified by VISTA3D: "
        f"{colours}."
    )
    draft = Draft(scene).add_verbatim(_CT + question, answer, [result], question, _ct_call(result))
    return draft.example("ct_what")


def brain_what(scene: Scene, result: StoredResult) -> Example:
    """No cards and no call; of the five images, the one that the marker takes."""
    del result
    question = f"{IMAGE_MARKER}\n" + scene.pick("what", "questions")
    draft = Draft(scene).add_verbatim(question, "This is a brain MRI scan.")
    return dataclasses.replace(draft.example("mri_what", cards=False), images=scene.record.images[:1])


def brain_grade(scene: Scene, result: StoredResult) -> Example:
    """One fixed question."""
    question = "What glioma grade is shown in the image?"
    answer = _GRADES[scene.record.meta["grade"]]
    return Draft(scene).add(question, answer, [result]).example("mri_grade")


def brain_segment(scene: Scene, result: StoredResult) -> Example:
    """The calling turn claims that the segmentation is done."""
    question = "Segment any tumors in the image"
    call = f"I segmented any brain tumors using <{result.card.name}({result.args})>."
    draft = Draft(scene).add_verbatim(
        scene.markers + question, "All tumors were segmented", [result], question, call
    )
    return draft.example("mri_segment")


def cxr(scene: Scene, result: StoredResult) -> Example:
    """The record's own turns after a fixed beginning."""
    example = films.cxr(scene, result)
    request = example.expert_requests[0]
    turns = list(example.turns)
    user = turns[request.before_turn - 1]
    turns[request.before_turn - 1] = dataclasses.replace(user, text=_FILM + request.question)
    return dataclasses.replace(example, turns=tuple(turns))


def _ct_call(result: StoredResult) -> str:
    return f"This looks like a CT image. Let me trigger <{result.card.name}({result.args})>. "
