"""Items that know whether their answer is open or closed, for evaluators that treat the two differently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from vilam3_jax.data.examples import Example
from vilam3_jax.errors import UserError
from vilam3_jax.evals.items import Item, qa_of_dialogues
from vilam3_jax.evals.protocol import Protocol

OPEN, CLOSED = "open", "closed"


def questions_with_answer_type(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """`qa_of_dialogues` with `answer_type` in `answer_spec`.

    It is the `answer_type` of the entry of `meta["qa"]`, or else the start of the question type, as in
    "closed_rephrased".

    Raises:
      UserError: an item has neither.
    """
    listed = list(examples)
    stated = {
        f"{example.id}/q{position}": qa["answer_type"]
        for example in listed
        for position, qa in enumerate(example.meta.get("qa") or ())
        if "answer_type" in qa
    }
    for item in qa_of_dialogues(listed, protocol):
        kind = stated.get(item.id, item.question_type.partition("_")[0])
        if kind not in (OPEN, CLOSED):
            raise UserError(
                f"item {item.id!r}: neither open nor closed; prepare {item.dataset or 'the dataset'} again"
            )
        yield dataclasses.replace(item, answer_spec={**item.answer_spec, "answer_type": kind})


RULES = {"questions_with_answer_type": questions_with_answer_type}
