"""Dialogues about the MRI sequences of a head: description, tumour, grade, segmentation.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.draft import Draft
from vilam3_jax.data.experts.dialogues.pools import pool
from vilam3_jax.data.experts.dialogues.scene import Finding, Scene, Unfit
from vilam3_jax.data.experts.dialogues.tell import follow_up, legend_of, nests

GRADES = ("LGG", "HGG")


def findings(scene: Scene) -> list[Finding]:
    """Results of the brain tumour expert."""
    return scene.usable("BRATS", lambda f: f.segments and nests(f))


def graded(scene: Scene) -> list[Finding]:
    """`findings` of a record that states its grade."""
    grade = scene.record.meta.get("grade")
    if grade not in GRADES:
        raise Unfit(f"meta.grade is {grade!r}, none of {', '.join(GRADES)}")
    return findings(scene)


def what(scene: Scene, finding: Finding) -> Example:
    """What do these images show?"""
    kind = "what_answers" if _has_tumor(scene, finding) else "what_empty"
    if not scene.spoken:
        kind = "what_alone" if _has_tumor(scene, finding) else "what_alone_empty"
    answer = scene.pick("brain", kind, legend=legend_of(finding))
    draft = Draft(scene).exchange(scene.pick("what", "questions"), answer, [finding])
    follow_up(scene, draft, finding)
    return draft.example("mri_what")


def tumor(scene: Scene, finding: Finding, rule: str = "mri_tumor") -> Example:
    """Is a tumour on this slice?"""
    there = _has_tumor(scene, finding)
    question = scene.pick("brain", "tumor")
    answer = scene.pick("brain", "tumor_yes" if there else "tumor_no")
    if question in pool("brain")["tumor_negated"]:  # 'free of tumor?': the other way round
        head, tail = answer.split(", ", 1)
        answer = f"{'No' if head == 'Yes' else 'Yes'}, {tail}"
    draft = Draft(scene).exchange(question, answer, [finding])
    follow_up(scene, draft, finding)
    return draft.example(rule, tumor=there)


def grade(scene: Scene, finding: Finding) -> Example:
    """Low-grade or high-grade glioma?"""
    answer = scene.pick("brain", "grade_answers", scene.record.meta["grade"])
    draft = Draft(scene).exchange(scene.pick("brain", "grade"), answer, [finding])
    follow_up(scene, draft, finding)
    return draft.example("mri_grade")


def segment(scene: Scene, finding: Finding) -> Example:
    """Segment the tumour."""
    if not scene.spoken:
        return tumor(scene, finding, "mri_segment")
    kind = ("brain", "segment_answers") if finding.labels else ("what", "nothing")
    answer = scene.pick(*kind, legend=legend_of(finding))
    draft = Draft(scene).exchange(scene.pick("brain", "segment"), answer, [finding])
    follow_up(scene, draft, finding)
    return draft.example("mri_segment")


def _has_tumor(scene: Scene, finding: Finding) -> bool:
    pixels = sum(label.pixels for label in finding.labels)
    if 0 < pixels < scene.setting.min_pixels:
        raise Unfit(f"tumor covers {pixels} pixels of the slice, too few to ask about")
    return pixels > 0
