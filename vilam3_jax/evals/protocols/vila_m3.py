"""`vila-m3/parity` and `vila-m3/strict`: the benchmarks of VILA-M3, with its evaluators' defects and without.

Both ask the same questions with the same prompts, read from the released scripts (`m3/eval` of
Project-MONAI/VLM-Radiology-Agent-Framework) and described in docs/evaluation_protocols.md. Parity protocols
need datasets prepared with `--parity`, which gives the reference's ids and question wording.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.cards import load_cards, render_cards
from vilam3_jax.data.experts.record import THRESHOLD
from vilam3_jax.errors import UserError
from vilam3_jax.evals.items import Item, qa_of_dialogues, qa_of_studies
from vilam3_jax.evals.prompts import PromptContext, Request
from vilam3_jax.evals.protocol import Protocol, register
from vilam3_jax.evals.protocols import answer_types
from vilam3_jax.evals.reports import cleaning

# Ends the prompt of `--single-pred-prompt`, although the questions have no options.
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
REPORT_PROMPT = "Describe the image in detail."
FINDINGS_14 = ("fracture", "pneumothorax", "airspace_opacity")
FINDINGS_CHEXPERT = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural_effusion")
KINDS = ("abnormality", "presence", "view", "location", "level", "type")
EXPERT = "CXR"
_NAMES = {"airspace_opacity": "lung opacity"}
_CHOICES = {
    "chest_xray14": dict(zip(FINDINGS_14, ("Fracture", "Pneumothorax", "Lung Opacity"), strict=True)),
    "chexpert": {name: name.replace("_", " ").capitalize() for name in FINDINGS_CHEXPERT},
}
_NONE = "None of the Above"


# --- items


def distinct_reference_ids(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """One item per reference id, the last; `metric_radvqa.py` and `metric_slakevqa.py` collapse equal ids.

    Raises:
      UserError: an item has no reference id.
    """
    kept: dict[str, Item] = {}
    for item in qa_of_dialogues(examples, protocol):
        if not item.reference_id:
            raise UserError(
                f"item {item.id!r}: no reference id; prepare {item.dataset or 'the dataset'} with --parity"
            )
        kept[item.reference_id] = item
    return kept.values()


def choices_of_films(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """One question per film: which of its dataset's findings are there, or none of them.

    A film of which one of the findings is unknown is left out.
    """
    films: dict[str, dict[str, Item]] = {}
    for item in qa_of_dialogues(examples, protocol):
        films.setdefault(item.example, {})[item.question_type] = item
    for example, asked in films.items():
        first = next(iter(asked.values()))
        names = _CHOICES[first.dataset]
        if not names.keys() <= asked.keys():
            continue
        present = [name for finding, name in names.items() if asked[finding].answer == "yes"]
        yield dataclasses.replace(
            first,
            id=f"{example}/findings",
            question="What are the potential abnormalities according to the provided X-ray image?",
            answer="; ".join(present or [_NONE]),
            question_type="findings",
            options=(*names.values(), _NONE),
        )


def scored_reports(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """Requests for a report, without those whose own report is empty after cleaning."""
    return (item for item in qa_of_studies(examples, protocol) if cleaning.clean(item.answer))


# --- prompts


def letter_suffix(item: Item, context: PromptContext) -> Request:
    """The question, and `LETTER_SUFFIX`."""
    return Request(item.question.strip() + LETTER_SUFFIX)


def stripped(item: Item, context: PromptContext) -> Request:
    """The question alone."""
    return Request(item.question.strip())


def report(item: Item, context: PromptContext) -> Request:
    """`REPORT_PROMPT`, whatever the record asks."""
    return Request(REPORT_PROMPT)


def finding(item: Item, context: PromptContext) -> Request:
    """A yes/no question about the finding that the question type names."""
    return Request(
        "The following is a question about findings in chest X-ray in the frontal view. "
        "Please reply with yes or no.\n"
        f"Question: is there {_name(item)} according to the provided X-ray image?\n"
    )


def finding_with_expert(item: Item, context: PromptContext) -> Request:
    """The same after the classes of the CXR expert, each yes above a probability of 0.5.

    Raises:
      UserError: the image has no stored result.
    """
    lines = "".join(f" {line}\n" for line in _results(item, context))
    return Request(
        "The following is a question about findings in chest X-ray in the frontal view. "
        "When answering the question, please analyze the image and incorporate the additional results "
        f"generated by an expert classification model:\n{lines}"
        f"Question: is there {_name(item)} according to the provided X-ray image?\n"
        "Please reply with yes or no.\n"
    )


def _results(item: Item, context: PromptContext) -> list[str]:
    """`class: yes` or `class: no` of every class of the expert.

    Raises:
      UserError: the image has no stored result.
    """
    annotation = context.annotation(item, EXPERT)
    if annotation.status != "ok" or not annotation.probabilities:
        raise UserError(
            f"item {item.id!r}: no result of {EXPERT} ({annotation.reason}); give --annotations with results"
        )
    return [
        f"{name.lower().replace('_', ' ')}: {'yes' if value > THRESHOLD else 'no'}"
        for name, value in annotation.probabilities.items()
    ]


def report_with_expert(item: Item, context: PromptContext) -> Request:
    """The dialogue of the reference: cards and request, the call, and the results before the request again.

    The last turn says "prompt." where training says "prompt:". Images precede the cards here, and follow them
    in the reference.

    Raises:
      UserError: the image has no stored result.
    """
    lines = "".join(f"{line}\n" for line in _results(item, context))
    first = f"{render_cards(load_cards('vila_m3'))} This is a CXR image.\n{REPORT_PROMPT}"
    return Request(
        f"The resulting predictions are:\n{lines}. Analyze the image and take these predictions into account "
        f"when responding to this prompt.\n{REPORT_PROMPT}",
        ((first, "This looks like an chest x-ray. Let me first trigger <CXR()>."),),
    )


def choices(item: Item, context: PromptContext) -> Request:
    """The question after its introduction, and the options by letter."""
    listed = "".join(
        f"({letter}) {option}\n" for letter, option in zip(string.ascii_uppercase, item.options, strict=False)
    )
    return Request(
        "The following is a multiple-choice question about findings in chest X-ray in the frontal view. "
        f"Please reply with the corresponding answer choice letter(s).\nQuestion: {item.question}\n{listed}"
    )


def _name(item: Item) -> str:
    return _NAMES.get(item.question_type, item.question_type.replace("_", " "))


# --- parsers


def parse_cleaned_report(text: str, options: object = (), **answer_spec: object) -> str | None:
    """The report after VILA-M3's cleaning; None if nothing is left."""
    return cleaning.clean(text) or None


_ITEM_RULES = {
    "vila_m3_distinct_ids": distinct_reference_ids,
    "vila_m3_scored_reports": scored_reports,
    "vila_m3_choices_of_films": choices_of_films,
    **answer_types.RULES,
}
_PROMPTS = {
    "vila_m3_letter_suffix": letter_suffix,
    "vila_m3_stripped": stripped,
    "vila_m3_report": report,
    "vila_m3_report_with_expert": report_with_expert,
    "vila_m3_choices": choices,
    "vila_m3_finding": finding,
    "vila_m3_finding_with_expert": finding_with_expert,
}
_PARSERS = {"vila_m3_cleaned_report": parse_cleaned_report}


# --- protocols

_PARITY = (
    Protocol(
        id="vila-m3/parity/vqa-rad",
        version=1,
        items="vila_m3_distinct_ids",
        split="test",
        question_types=("closed", "closed_rephrased"),
        prompt="vila_m3_letter_suffix",
        parser="vila_m3_strip_lower",
        parser_of_type=(),
        metric="accuracy",
        max_new_tokens=1024,
        description=(
            "Closed questions of the test phrase types and their rephrasings, whole-string equality after "
            "strip and lower."
        ),
        datasets=("vqa_rad",),
        compare_text=True,
    ),
    Protocol(
        id="vila-m3/parity/slake",
        version=1,
        items="vila_m3_distinct_ids",
        split="test",
        question_types=(),
        prompt="vila_m3_letter_suffix",
        parser="vila_m3_strip_lower",
        parser_of_type=(),
        metric="accuracy",
        max_new_tokens=1024,
        description="Open and closed questions together, whole-string equality after strip and lower.",
        datasets=("slake",),
        compare_text=True,
    ),
    Protocol(
        id="vila-m3/parity/path-vqa",
        version=1,
        items="qa_of_dialogues",
        split="test",
        question_types=("closed",),
        prompt="vila_m3_letter_suffix",
        parser="vila_m3_lower",
        parser_of_type=(),
        metric="accuracy",
        max_new_tokens=1024,
        description="Yes/no questions, whole-string equality after lower; whitespace at either end counts.",
        datasets=("path_vqa",),
        compare_text=True,
    ),
    Protocol(
        id="vila-m3/parity/mimic-vqa",
        version=1,
        items="questions_with_answer_type",
        split="test",
        question_types=KINDS,
        prompt="vila_m3_stripped",
        parser="vila_m3_mimic",
        parser_of_type=(),
        metric="closed_accuracy",
        max_new_tokens=1024,
        description=(
            "Six question types of Medical-Diff-VQA, each question alone. Headline: closed accuracy over all "
            "types, which is the mean of the types weighted by their closed questions (wavg_closed). "
            "Questions about differences are left out."
        ),
        datasets=("medical_diff_vqa",),
        metrics=("macro_closed_accuracy", "open_recall", "macro_open_recall"),
        compare_text=True,
    ),
    Protocol(
        id="vila-m3/parity/mimic-cxr-report",
        version=1,
        items="vila_m3_scored_reports",
        split="test",
        question_types=("report",),
        prompt="vila_m3_report",
        parser="vila_m3_cleaned_report",
        parser_of_type=(),
        metric="bleu_4",
        max_new_tokens=512,
        description="Cleaned reports against cleaned reports, sampled at temperature 0.2.",
        datasets=("mimic_cxr_reports",),
        metrics=("bleu_1", "bleu_2", "bleu_3", "rouge_l", "cider"),
        temperature=0.2,
    ),
    Protocol(
        id="vila-m3/parity/chestxray14",
        version=1,
        items="qa_of_dialogues",
        split="test",
        question_types=FINDINGS_14,
        prompt="vila_m3_finding",
        parser="vila_m3_yes_no_cxr14",
        parser_of_type=(),
        metric="vila_m3_f1",
        max_new_tokens=512,
        description="Mean F1 of three findings, without expert; what cannot be read is no.",
        datasets=("chest_xray14",),
        metrics=("accuracy",),
        compare_text=True,
    ),
    Protocol(
        id="vila-m3/parity/chexpert",
        version=1,
        items="qa_of_dialogues",
        split="test",
        question_types=FINDINGS_CHEXPERT,
        prompt="vila_m3_finding",
        parser="vila_m3_yes_no_chexpert",
        parser_of_type=(),
        metric="vila_m3_f1",
        max_new_tokens=512,
        description=(
            "Mean F1 of five findings, without expert. The script stops where it can read nothing; such an "
            "answer is unparsed here, and wrong."
        ),
        datasets=("chexpert",),
        metrics=("accuracy",),
        compare_text=True,
    ),
)
# Parser and metrics of the strict twins, by the last part of the id.
_STRICT = {
    "vqa-rad": ("by_options", "accuracy", ()),
    "slake": ("by_options", "accuracy", ()),
    "path-vqa": ("yes_no", "accuracy", ()),
    "mimic-vqa": ("by_options", "closed_accuracy", ("macro_closed_accuracy", "open_accuracy")),
    "chestxray14": ("yes_no", "macro_positive_f1", ("accuracy",)),
    "chexpert": ("yes_no", "macro_positive_f1", ("accuracy",)),
}


def _strict(parity: Protocol) -> Protocol:
    name = parity.id.rpartition("/")[2]
    parser, metric, metrics = _STRICT[name]
    return dataclasses.replace(
        parity,
        id=f"vila-m3/strict/{name}",
        parser=parser,
        metric=metric,
        metrics=metrics,
        compare_text=False,
        description=(
            f"The items and prompts of {parity.name}. An answer is read from its start, and one that cannot "
            "be read is unparsed and wrong; case and punctuation at either end do not count."
        ),
    )


def _with_expert(plain: Protocol) -> Protocol:
    return dataclasses.replace(
        plain,
        id=f"{plain.id}-expert",
        prompt=f"{plain.prompt}_with_expert",
        description=f"As {plain.name}, with the classes of the CXR expert in the prompt.",
    )


def _choices(name: str, dataset: str) -> Protocol:
    return Protocol(
        id=f"vila-m3/strict/{name}-choices",
        version=1,
        items="vila_m3_choices_of_films",
        split="test",
        question_types=(),
        prompt="vila_m3_choices",
        parser="choices",
        parser_of_type=(),
        metric="label_f1",
        max_new_tokens=512,
        description=(
            "Which findings a film shows, by letters: mean F1 of the sets of findings. The released scripts "
            "ask this and do not score it, so there is no parity protocol."
        ),
        datasets=(dataset,),
        metrics=("label_precision", "label_recall", "accuracy"),
    )


_PLAIN = (*_PARITY, *(_strict(one) for one in _PARITY if one.id.rpartition("/")[2] in _STRICT))
PROTOCOLS = (
    *_PLAIN,
    *(_with_expert(one) for one in _PLAIN if f"{one.prompt}_with_expert" in _PROMPTS),
    _choices("chestxray14", "chest_xray14"),
    _choices("chexpert", "chexpert"),
)
for _protocol in PROTOCOLS:
    register(_protocol, _PARSERS, prompts=_PROMPTS, item_rules=_ITEM_RULES)
