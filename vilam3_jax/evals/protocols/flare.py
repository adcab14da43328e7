"""`flare26`: the six task families of FLARE-MLLM-2D, as the baseline of 2026 scores them (`evaluate.py`)."""

from __future__ import annotations

import string
from collections.abc import Iterable

from vilam3_jax.data.examples import Example
from vilam3_jax.evals.items import Item, qa_of_studies
from vilam3_jax.evals.parsers.published import flare_labels
from vilam3_jax.evals.prompts import PromptContext, Request
from vilam3_jax.evals.protocol import Protocol, register
from vilam3_jax.evals.protocols.reports import parse_report

LABELS = "multi_label_classification"


def scored_questions(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """Every question about all images of its record, without those about labels that have none.

    The scorer drops rows without an answer, so images without any label are never asked about.
    """
    return (
        item
        for item in qa_of_studies(examples, protocol)
        if item.question_type != LABELS or flare_labels(item.answer)
    )


def prompt(item: Item, context: PromptContext) -> Request:
    """The question; options that the source lists beside it follow, one per line."""
    if not item.options:
        return Request(item.question)
    listed = (f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, item.options, strict=False))
    return Request("\n".join((item.question, *listed, "Answer with the text of the right option.")))


def _protocol(
    family: str, parser: str, metric: str, metrics: tuple[str, ...], description: str, *, tokens: int = 128
) -> Protocol:
    return Protocol(
        id=f"flare26/{family}",
        version=1,
        items="flare_scored_questions",
        split="",
        question_types=(family,),
        prompt="flare",
        parser=parser,
        parser_of_type=(),
        metric=metric,
        max_new_tokens=tokens,
        description=description,
        datasets=("flare_mllm_2d",),
        metrics=metrics,
        compare_text=True,
    )


PROTOCOLS = (
    _protocol(
        "disease_diagnosis_classification",
        "flare_class",
        "balanced_accuracy",
        ("accuracy",),
        "Balanced accuracy of equal texts, without case and repeated whitespace.",
    ),
    _protocol(
        LABELS,
        "flare_labels",
        "label_f1",
        ("label_precision", "label_recall"),
        "Mean F1 of the label sets of each question.",
    ),
    _protocol(
        "detection",
        "boxes",
        "detection_f1_0.5",
        ("detection_f1_0.3", "detection_f1_mean"),
        "F1 of boxes at an IoU of 0.5, counted over all questions; an answer that cannot be read has none.",
        tokens=2048,
    ),
    _protocol(
        "cell_counting",
        "flare_number",
        "flare_mae",
        ("flare_rmse",),
        "Mean absolute error of the first number; an answer without one counts as 0.",
    ),
    _protocol(
        "regression",
        "flare_number",
        "flare_mae",
        ("flare_rmse",),
        "Mean absolute error of the first number; an answer without one counts as 0.",
    ),
    _protocol(
        "report_generation",
        "report",
        "rouge_l",
        ("bleu_4", "cider"),
        "ROUGE-L of reports. The challenge's GREEN and CRIMSON need a language model; they are computed from "
        "the rows.",
        tokens=1024,
    ),
)
for _one in PROTOCOLS:
    register(
        _one,
        {"report": parse_report},
        prompts={"flare": prompt},
        item_rules={"flare_scored_questions": scored_questions},
    )
