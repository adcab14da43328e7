"""`medevalkit`: MedEvalKit without a judge (alibaba-damo-academy/MedEvalKit, `utils/utils.py`).

The prompt depends on the right answer: a question is asked for 'yes' or 'no' if that is its answer. That is
the reference's rule, and it tells the model the kind of the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from vilam3_jax.data.examples import Example
from vilam3_jax.evals.items import Item, qa_of_dialogues
from vilam3_jax.evals.prompts import PromptContext, Request
from vilam3_jax.evals.protocol import Protocol, register
from vilam3_jax.evals.protocols.answer_types import CLOSED, OPEN, RULES, questions_with_answer_type

_YES_NO = "Please output 'yes' or 'no'(no extra output)."
_SHORT = "Answer the question using a single word or phrase."
_CONCISE = "Please answer the question concisely."


def by_answer(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """Every question; closed if its answer is yes or no (VQA-RAD, PathVQA)."""
    for item in qa_of_dialogues(examples, protocol):
        kind = CLOSED if _is_yes_no(item) else OPEN
        yield dataclasses.replace(item, answer_spec={**item.answer_spec, "answer_type": kind})


def by_stated_type(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """Every question; closed if the source says so (SLAKE).

    The source spells 'Yes' and 'No' with a capital and the reference tests for 'yes' and 'no', so that the
    rule for yes and no never applies: items have no options, and closed answers must be equal.
    """
    for item in questions_with_answer_type(examples, protocol):
        yield dataclasses.replace(item, options=())


def prompt(item: Item, context: PromptContext) -> Request:
    """The question, and how to answer it."""
    if _is_yes_no(item):
        form = _YES_NO
    else:
        form = _SHORT if item.answer_spec.get("answer_type") == CLOSED else _CONCISE
    return Request(f"{item.question}\n{form}")


def _is_yes_no(item: Item) -> bool:
    return sorted(option.lower() for option in item.options) == ["no", "yes"]


def _protocol(name: str, dataset: str, items: str, description: str) -> Protocol:
    return Protocol(
        id=f"medevalkit/{name}",
        version=1,
        items=items,
        split="test",
        question_types=("open", "closed"),
        prompt="medevalkit",
        parser="medevalkit",
        parser_of_type=(),
        metric="accuracy",
        max_new_tokens=1024,
        description=description,
        datasets=(dataset,),
        metrics=("open_accuracy", "closed_accuracy"),
        compare_text=True,
    )


_BY_ANSWER = "Yes/no questions: exactly one of the two is a part of the answer. Others: equal texts."
PROTOCOLS = (
    _protocol("vqa-rad", "vqa_rad", "medevalkit_by_answer", _BY_ANSWER),
    _protocol("path-vqa", "path_vqa", "medevalkit_by_answer", _BY_ANSWER),
    _protocol(
        "slake",
        "slake",
        "medevalkit_by_stated_type",
        "Equal texts; closed answers without full stops and line breaks. No judge.",
    ),
)
for _one in PROTOCOLS:
    register(
        _one,
        prompts={"medevalkit": prompt},
        item_rules={
            "medevalkit_by_answer": by_answer,
            "medevalkit_by_stated_type": by_stated_type,
            **RULES,
        },
    )
