"""The rules: what each makes of which records.

This module imports neither jax nor flax nor torch.
"""

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
    """One kind of dialogue.

    Attributes:
      name: in a mixture's row, after the colon.
      about: what it asks, for people.
      options: of a record, what there is to choose from; raises `Unfit` where there is nothing.
      tell: makes the dialogue of one option.
      parity: makes it in the reference's words; None where the reference has no such dialogue.
      modality: of the records it is for; '' for any.
    """

    name: str
    about: str
    options: Callable[[Scene], Sequence[Any]]
    tell: Callable[[Scene, Any], Example]
    parity: Callable[[Scene, Any], Example] | None = None
    modality: str = ""

    def unfit(self, scene: Scene) -> str | None:
        """Why the rule makes no dialogue of a record, or None; looks at no picture."""
        try:
            self._choices(scene)
        except Unfit as reason:
            return str(reason)
        return None

    def make(self, scene: Scene) -> Example:
        """The dialogue of a record.

        Raises:
          Unfit: there is none.
        """
        choice = scene.rng.choice(self._choices(scene))
        if scene.setting.parity and scene.spoken and self.parity is not None:
            return self.parity(scene, choice)
        return self.tell(scene, choice)

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
    Rule(
        "ct_tumor", "a tumor on the slice, and their number", ct.tumor_findings, ct.tumor, parity.tumor, "CT"
    ),
    Rule("ct_segment", "structures to be segmented", ct.segmentations, ct.segment, parity.segment, "CT"),
    Rule("ct_what", "what the slice shows", ct.descriptions, ct.what, parity.what, "CT"),
    Rule("mri_what", "what the sequences show", mri.findings, mri.what, parity.brain_what, "MRI"),
    Rule("mri_tumor", "a tumor on the slice", mri.findings, mri.tumor, None, "MRI"),
    Rule("mri_grade", "the grade of a glioma", mri.graded, mri.grade, parity.brain_grade, "MRI"),
    Rule("mri_segment", "the tumor to be segmented", mri.findings, mri.segment, parity.brain_segment, "MRI"),
    Rule("cxr", "the record's own questions", films.own_questions, films.cxr, parity.cxr, "CXR"),
    Rule("cxr_finding", "one finding on the film", films.clear_findings, films.one_finding, None, "CXR"),
    Rule("no_expert", "what needs no expert", negatives.topics, negatives.no_expert),
    Rule(
        "wrong_modality", "what another modality's expert does", negatives.tempting, negatives.wrong_modality
    ),
    Rule("expert_failed", "what the expert could not analyse", negatives.failures, negatives.failed),
    Rule("expert_doubted", "a result that checks doubt", negatives.doubted_findings, negatives.doubted),
    Rule("experts_disagree", "what two experts differ on", negatives.disputes, negatives.disagree),
    Rule("several_calls", "two results at once", negatives.several_findings, negatives.several_calls),
)
RULES = {rule.name: rule for rule in _RULES}


def split_row(name: str) -> tuple[str, Rule | None]:
    """The dataset and the rule of `NAME` or `NAME:RULE`, the name in a mixture's row.

    Raises:
      UserError: there is no such rule.
    """
    dataset, colon, rule = name.partition(":")
    if not colon:
        return name, None
    if rule not in RULES:
        raise UserError(f"{name!r} names no rule of dialogues; use NAME:RULE with one of {', '.join(RULES)}")
    return dataset, RULES[rule]
