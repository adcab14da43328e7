"""Dialogues about CT slices: tumors and their count, segmentation, description."""

from __future__ import annotations

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.draft import (
    MAX_NAMES,
    Draft,
    add_follow_ups,
    by_size,
    describe,
    dialogue,
)
from vilam3_jax.data.experts.dialogues.phrases import plural, pool, said, with_article
from vilam3_jax.data.experts.dialogues.scene import Scene, StoredResult, Unfit
from vilam3_jax.data.experts.grammar import joined
from vilam3_jax.data.experts.labels import is_lesion
from vilam3_jax.data.experts.wording import IMAGE_OF

_GENERAL = ("everything", "", "organs")  # arguments for a question without a subject


def lesion_results(scene: Scene) -> list[StoredResult]:
    """Results of calls for a lesion; of experts without arguments, those with a lesion among their labels."""
    return scene.usable(
        "an expert for lesions",
        lambda r: r.is_segmentation and (is_lesion(r.args) or not r.card.args) and bool(r.lesions()),
    )


def segmentations(scene: Scene) -> list[StoredResult]:
    """Results with a label map. In the reference, only `tumor` asks for lesions."""
    lesions = not scene.setting.parity
    return scene.usable(
        "a segmentation expert", lambda r: r.is_segmentation and (lesions or not is_lesion(r.args))
    )


def descriptions(scene: Scene) -> list[StoredResult]:
    """The most general results, excluding calls for a lesion."""
    found = scene.usable("a segmentation expert", lambda r: r.is_segmentation and not is_lesion(r.args))
    if scene.setting.parity:
        return found
    return next((most for args in _GENERAL if (most := [r for r in found if r.args == args])), found)


def lesion_question(scene: Scene, args: str, name: str) -> str:
    """Asks whether a slice shows a lesion: politely, as a command, or with a synonym."""
    known = pool("lesions").get(args)
    if known is None:
        return scene.pick("presence", "questions", a_lesion=with_article(name))
    return scene.pick("lesions", args, scene.rng.choice(sorted(known)))


def tumor(scene: Scene, result: StoredResult) -> Example:
    """Does this slice show a tumor, and how many are in the scan?"""
    label_id, name = scene.rng.choice(sorted(result.lesions().items()))
    marked = next((label for label in result.labels if label.label_id == label_id), None)
    if marked is not None and marked.pixels < scene.setting.min_pixels:
        raise Unfit(f"{name} covers {marked.pixels} pixels of the slice, too few to ask about")
    words = {"lesion": name, "a_lesion": with_article(name), "plural": plural(name)}
    kind = ("no" if marked is None else "yes") + ("" if scene.experts_on else "_alone")
    question = lesion_question(scene, result.args, name)
    draft = Draft(scene).add(question, scene.pick("presence", kind, **words), [result])
    if marked is not None and scene.experts_on and scene.setting.style.wording.reports_measurements:
        count = result.components(marked)
        if marked.ml >= scene.setting.min_lesion_ml * count:
            answer = "one" if count == 1 else "several"
            question = scene.pick("counts", "questions", **words)
            draft.add(question, scene.pick("counts", answer, count=str(count), **words))
    add_follow_ups(scene, draft, result)
    return draft.example("ct_tumor", tumor=marked is not None)


def segment(scene: Scene, result: StoredResult) -> Example:
    """Segment a group of structures."""
    if not scene.experts_on:
        return what(scene, result, "ct_segment")
    groups = pool("groups")
    asked = scene.rng.choice(groups.get(result.args, groups["everything"]))
    found = describe(scene, result)
    answer = asked["answer"].format(found=found) if found else scene.pick("what", "nothing")
    return dialogue(scene, result, "ct_segment", asked["question"], answer)


def what(scene: Scene, result: StoredResult, rule: str = "ct_what") -> Example:
    """What does this slice show?"""
    found, a_kind = describe(scene, result), IMAGE_OF["CT"]
    words = {"a_kind": a_kind, "A_kind": a_kind[0].upper() + a_kind[1:], "found": found}
    if scene.experts_on:
        kind = "answers" if found else "empty"
    else:
        kind = "alone" if found else "alone_empty"
        names = [f"the {said(label.name)}" for label in by_size(result)[:MAX_NAMES]]
        words["names"] = joined(names) if found else ""
    question = scene.pick("what", "questions")
    return dialogue(scene, result, rule, question, scene.pick("what", kind, **words))
