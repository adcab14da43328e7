"""`medgemma-card`: the metrics that the model card of MedGemma names.

The evaluator is not published. Prompts are the questions alone, and the split is the official one: the
balanced split of VQA-RAD, on which the card reports, is not part of the data. So results are those of the
card's metrics, not of its test sets.
"""

from __future__ import annotations

from vilam3_jax.evals.protocol import Protocol, register
from vilam3_jax.evals.protocols.answer_types import RULES
from vilam3_jax.evals.protocols.vila_m3 import FINDINGS_14, FINDINGS_CHEXPERT


def _questions(name: str, dataset: str) -> Protocol:
    return Protocol(
        id=f"medgemma-card/{name}",
        version=1,
        items="questions_with_answer_type",
        split="test",
        question_types=("open", "closed"),
        prompt="single_turn",
        parser="medgemma_tokens",
        parser_of_type=(),
        metric="token_f1",
        max_new_tokens=256,
        description=(
            "F1 of words over all questions, without case, punctuation and articles; accuracy where the "
            "right answer is exactly yes or no; recall of words over open questions."
        ),
        datasets=(dataset,),
        metrics=("yes_no_accuracy", "open_recall"),
        compare_text=True,
    )


def _findings(name: str, dataset: str, findings: tuple[str, ...]) -> Protocol:
    return Protocol(
        id=f"medgemma-card/{name}",
        version=1,
        items="qa_of_dialogues",
        split="test",
        question_types=findings,
        prompt="single_turn",
        parser="yes_no",
        parser_of_type=(),
        metric="macro_positive_f1",
        max_new_tokens=64,
        description=f"Mean F1 of {len(findings)} findings.",
        datasets=(dataset,),
        metrics=("accuracy",),
    )


PROTOCOLS = (
    _questions("vqa-rad", "vqa_rad"),
    _questions("slake", "slake"),
    _findings("chestxray14", "chest_xray14", FINDINGS_14),
    _findings("chexpert", "chexpert", FINDINGS_CHEXPERT),
)
for _one in PROTOCOLS:
    register(_one, item_rules=RULES)
