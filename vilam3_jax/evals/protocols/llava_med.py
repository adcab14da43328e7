"""`llava-med`: closed accuracy and open recall as LLaVA-Med computes them (`llava/eval/run_eval.py`)."""

from __future__ import annotations

from vilam3_jax.evals.protocol import Protocol, register
from vilam3_jax.evals.protocols.answer_types import RULES


def _protocol(name: str, dataset: str) -> Protocol:
    return Protocol(
        id=f"llava-med/{name}",
        version=1,
        items="questions_with_answer_type",
        split="test",
        question_types=("open", "closed"),
        prompt="single_turn",
        parser="llava_med",
        parser_of_type=(),
        metric="llava_med_closed_accuracy",
        max_new_tokens=1024,
        description=(
            "Closed: the answer contains the right one of yes and no, as a part of any word. Open: share of "
            "the right answer's words that the answer has."
        ),
        datasets=(dataset,),
        metrics=("open_recall", "llava_med_closed_accuracy_as_released"),
        compare_text=True,
    )


PROTOCOLS = (
    _protocol("vqa-rad", "vqa_rad"),
    _protocol("slake", "slake"),
    _protocol("path-vqa", "path_vqa"),
)
for _one in PROTOCOLS:
    register(_one, item_rules=RULES)
