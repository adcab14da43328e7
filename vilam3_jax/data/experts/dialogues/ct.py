"""Dialogues about CT slices: tumours and their count, segmentation, description.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.draft import Draft
from vilam3_jax.data.experts.dialogues.phrases import capital, plural, said, with_article
from vilam3_jax.data.experts.dialogues.pools import pool
from vilam3_jax.data.experts.dialogues.scene import Finding, Scene, Unfit
from vilam3_jax.data.experts.dialogues.tell import MOST_NAMES, by_size, follow_up, found_in
from vilam3_jax.data.experts.grammar import joined
from vilam3_jax.data.experts.labels import is_lesion
from vilam3_jax.data.experts.wording import IMAGE_OF

_GENERAL = ("everything", "", "organs")  # arguments that a question without a subject calls for


def tumor_findings(scene: Scene) -> list[Finding]:
    """Results that were asked for a lesion; of an expert without arguments, those that know one."""
    return scene.usable(
        "an expert for lesions",
        lambda f: f.segments and (is_lesion(f.args) or not f.card.args) and bool(f.lesions()),
    )


def segmentations(scene: Scene) -> list[Finding]:
    """Every result with a label map; in the reference, lesions are asked about by `tumor` alone."""
    lesions = not scene.setting.parity
    return scene.usable("a segmentation expert", lambda f: f.segments and (lesions or not is_lesion(f.args)))


def descriptions(scene: Scene) -> list[Finding]:
    """Results that describe a slice: the most general ones, none that was asked for a lesion alone."""
    found = scene.usable("a segmentation expert", lambda f: f.segments and not is_lesion(f.args))
    if scene.setting.parity:
        return found
    return next((most for args in _GENERAL if (most := [f for f in found if f.args == args])), found)


def lesion_question(scene: Scene, args: str, name: str) -> str:
    """Asks whether a slice shows a lesion: politely, as a command, or by another word."""
    known = pool("lesions").get(args)
    if known is None:
        return scene.pick("presence", "questions", a_lesion=with_article(name))
    return scene.pick("lesions", args, scene.rng.choice(sorted(known)))


def tumor(scene: Scene, finding: Finding) -> Example:
    """Is a tumour on this slice, and how many does the scan have?"""
    label_id, name = scene.rng.choice(sorted(finding.lesions().items()))
    marked = next((label for label in finding.labels if label.label_id == label_id), None)
    if marked is not None and marked.pixels < scene.setting.min_pixels:
        raise Unfit(f"{name} covers {marked.pixels} pixels of the slice, too few to ask about")
    words = {"lesion": name, "a_lesion": with_article(name), "plural": plural(name)}
    kind = ("no" if marked is None else "yes") + ("" if scene.spoken else "_alone")
    draft = Draft(scene).exchange(
        lesion_question(scene, finding.args, name), scene.pick("presence", kind, **words), [finding]
    )
    if marked is not None and scene.spoken and scene.setting.style.wording.tells_figures:
        parts = finding.parts(marked)
        if marked.ml >= scene.setting.min_lesion_ml * parts:
            answer = "one" if parts == 1 else "several"
            draft.exchange(
                scene.pick("counts", "questions", **words),
                scene.pick("counts", answer, count=str(parts), **words),
            )
    follow_up(scene, draft, finding)
    return draft.example("ct_tumor", tumor=marked is not None)


def segment(scene: Scene, finding: Finding) -> Example:
    """Segment a group of structures."""
    if not scene.spoken:
        return what(scene, finding, "ct_segment")
    groups = pool("groups")
    asked = scene.rng.choice(groups.get(finding.args, groups["everything"]))
    found = found_in(scene, finding)
    answer = asked["answer"].format(found=found) if found else scene.pick("what", "nothing")
    draft = Draft(scene).exchange(asked["question"], answer, [finding])
    follow_up(scene, draft, finding)
    return draft.example("ct_segment")


def what(scene: Scene, finding: Finding, rule: str = "ct_what") -> Example:
    """What does this slice show?"""
    found = found_in(scene, finding)
    words = {"a_kind": IMAGE_OF["CT"], "A_kind": capital(IMAGE_OF["CT"]), "found": found}
    if scene.spoken:
        kind = "answers" if found else "empty"
    else:
        kind = "alone" if found else "alone_empty"
        words["names"] = (
            joined([f"the {said(one.name)}" for one in by_size(finding)[:MOST_NAMES]]) if found else ""
        )
    draft = Draft(scene).exchange(
        scene.pick("what", "questions"), scene.pick("what", kind, **words), [finding]
    )
    follow_up(scene, draft, finding)
    return draft.example(rule)
