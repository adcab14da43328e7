"""The rules that turn records into dialogues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues import ct, films, mri, negatives, parity
from vilam3_jax.data.experts.dialogues.scene import Scene, Unfit
from vilam3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of dialogue."""

    name: str  # the part of a mixture's row after the colon
    options: Callable[[Scene], Sequence[Any]]  # choices that a record offers; raises `Unfit` for none
    build: Callable[[Scene, Any], Example]  # the dialogue of one choice
    # The dialogue in the reference's words; None if the reference has none.
    parity: Callable[[Scene, Any], Example] | None = None
    modality: str = ""  # modality of the records; '' for any
    needs_experts: bool = False  # the question needs experts; with experts off, `no_expert` replaces it

    def unfit(self, scene: Scene) -> str | None:
        """The reason why the rule does not fit a record, or None; decodes no image."""
        try:
            self._choices(scene)
        except Unfit as reason:
            return str(reason)
        return None

    def make(self, scene: Scene) -> Example:
        """Returns a dialogue about a record; raises `Unfit` if there is none."""
        choice = scene.rng.choice(self._choices(scene))
        if scene.setting.parity and scene.experts_on and self.parity is not None:
            return self.parity(scene, choice)
        if self.needs_experts and not scene.experts_on:
            return negatives.no_expert(scene, scene.rng.choice(negatives.topics(scene)), self.name)
        return self.build(scene, choice)

    def _choices(self, scene: Scene) -> Sequence[Any]:
        if self.modality and scene.modality != self.modality:
            raise Unfit(f"is of modality {scene.modality or 'unknown'}, the rule is for {self.modality}")
        images = len(scene.record.images)
        if not images:
            raise Unfit("has no images")
        if images > 1 and sorted(set(scene.roles)) != sorted(scene.roles):
            raise Unfit(f"has {images} images and no meta.roles that tell them apart")
        if len(scene.roles) != images:
            raise Unfit(f"has {images} images and {len(scene.roles)} meta.roles")
        return self.options(scene)


_RULES = (
    Rule("ct_tumor", ct.lesion_results, ct.tumor, parity.tumor, "CT"),
    Rule("ct_segment", ct.segmentations, ct.segment, parity.segment, "CT"),
    Rule("ct_what", ct.descriptions, ct.what, parity.what, "CT"),
    Rule("mri_what", mri.results, mri.what, parity.brain_what, "MRI"),
    Rule("mri_tumor", mri.results, mri.tumor, None, "MRI"),
    Rule("mri_grade", mri.graded, mri.grade, parity.brain_grade, "MRI"),
    Rule("mri_segment", mri.results, mri.segment, parity.brain_segment, "MRI"),
    Rule("cxr", films.own_questions, films.cxr, parity.cxr, "CXR"),
    Rule("cxr_finding", films.clear_findings, films.one_finding, None, "CXR"),
    Rule("no_expert", negatives.topics, negatives.no_expert),
    Rule("wrong_modality", negatives.other_modality_cards, negatives.wrong_modality),
    Rule("expert_failed", negatives.failures, negatives.failed, needs_experts=True),
    Rule("expert_doubted", negatives.doubted_results, negatives.doubted, needs_experts=True),
    Rule("experts_disagree", negatives.conflicts, negatives.disagree, needs_experts=True),
    Rule("several_calls", negatives.result_pairs, negatives.several_calls, needs_experts=True),
)
RULES = {rule.name: rule for rule in _RULES}


def split_row(name: str) -> tuple[str, Rule | None]:
    """Splits a mixture's row, `NAME` or `NAME:RULE`; raises `UserError` for an unknown rule."""
    dataset, colon, rule = name.partition(":")
    if not colon:
        return name, None
    if rule not in RULES:
        raise UserError(f"{name!r} names no rule of dialogues; use NAME:RULE with one of {', '.join(RULES)}")
    return dataset, RULES[rule]
