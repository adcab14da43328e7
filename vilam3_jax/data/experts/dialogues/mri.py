"""Dialogues about brain MRI sequences: description, tumor, grade, segmentation."""

from __future__ import annotations

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.draft import dialogue, has_nested_regions, nested_legend
from vilam3_jax.data.experts.dialogues.phrases import pool
from vilam3_jax.data.experts.dialogues.scene import Scene, StoredResult, Unfit

_GRADES = ("LGG", "HGG")


def results(scene: Scene) -> list[StoredResult]:
    """Results of the brain tumor expert."""
    return scene.usable("BRATS", lambda r: r.is_segmentation and has_nested_regions(r))


def graded(scene: Scene) -> list[StoredResult]:
    """`results` of a record with a grade."""
    grade = scene.record.meta.get("grade")
    if grade not in _GRADES:
        raise Unfit(f"meta.grade is {grade!r}, none of {', '.join(_GRADES)}")
    return results(scene)


def what(scene: Scene, result: StoredResult) -> Example:
    """What do these images show?"""
    kind = "what_answers" if _has_tumor(scene, result) else "what_empty"
    if not scene.experts_on:
        kind = "what_alone" if _has_tumor(scene, result) else "what_alone_empty"
    answer = scene.pick("brain", kind, legend=nested_legend(result))
    return dialogue(scene, result, "mri_what", scene.pick("what", "questions"), answer)


def tumor(scene: Scene, result: StoredResult, rule: str = "mri_tumor") -> Example:
    """Does this slice show a tumor?"""
    present = _has_tumor(scene, result)
    question = scene.pick("brain", "tumor")
    answer = scene.pick("brain", "tumor_yes" if present else "tumor_no")
    if question in pool("brain")["tumor_negated"]:  # such as 'free of tumor?'
        head, tail = answer.split(", ", 1)
        answer = f"{'No' if head == 'Yes' else 'Yes'}, {tail}"
    return dialogue(scene, result, rule, question, answer, tumor=present)


def grade(scene: Scene, result: StoredResult) -> Example:
    """Low-grade or high-grade glioma?"""
    answer = scene.pick("brain", "grade_answers", scene.record.meta["grade"])
    return dialogue(scene, result, "mri_grade", scene.pick("brain", "grade"), answer)


def segment(scene: Scene, result: StoredResult) -> Example:
    """Segment the tumor."""
    if not scene.experts_on:
        return tumor(scene, result, "mri_segment")
    kind = ("brain", "segment_answers") if result.labels else ("what", "nothing")
    answer = scene.pick(*kind, legend=nested_legend(result))
    return dialogue(scene, result, "mri_segment", scene.pick("brain", "segment"), answer)


def _has_tumor(scene: Scene, result: StoredResult) -> bool:
    pixels = sum(label.pixels for label in result.labels)
    if 0 < pixels < scene.setting.min_pixels:
        raise Unfit(f"tumor covers {pixels} pixels of the slice, too few to ask about")
    return pixels > 0
