"""`reports`: generated reports against radiologists' own, raw and cleaned.

`raw` keeps the source's text, `cleaned` is the text of the records. BLEU, ROUGE-L and CIDEr are those of
pycocoevalcap; the baseline `majority` is a constant report, the most frequent one of the training split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from vilam3_jax.data.examples import Example
from vilam3_jax.evals.items import Item, qa_of_studies
from vilam3_jax.evals.protocol import Protocol, register

_METRICS = ("bleu_1", "bleu_2", "bleu_3", "rouge_l", "cider", "distinct_reports")


def raw_reports(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """Every request for a report, whose answer is the source's own text; records without it are left out."""
    kept = [example for example in examples if example.meta.get("raw_report")]
    raw = {example.id: str(example.meta["raw_report"]) for example in kept}
    for item in qa_of_studies(kept, protocol):
        yield dataclasses.replace(item, answer=raw[item.example])


def _protocol(name: str, items: str, description: str) -> Protocol:
    return Protocol(
        id=f"reports/{name}",
        version=1,
        items=items,
        split="",
        question_types=("report",),
        prompt="single_turn",
        parser="report",
        parser_of_type=(),
        metric="bleu_4",
        max_new_tokens=512,
        description=description,
        metrics=_METRICS,
        arms=("model", "no_image", "majority"),
        contrasts=(
            ("gain over the text alone", "model", "no_image"),
            ("gain over a constant report", "model", "majority"),
        ),
    )


def parse_report(text: str, options: object = (), **answer_spec: object) -> str | None:
    """The report in one line; None if it is empty."""
    return " ".join(text.split()) or None


CLEANED = register(
    _protocol(
        "cleaned", "qa_of_studies", "Reports against the cleaned text of the records, greedy decoding."
    ),
    parsers={"report": parse_report},
)
RAW = register(
    _protocol("raw", "raw_reports", "Reports against the source's own text, greedy decoding."),
    item_rules={"raw_reports": raw_reports},
)
