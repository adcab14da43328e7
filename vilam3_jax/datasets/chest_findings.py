"""Questions about findings on chest X-rays, from labels that are known.

No question holds a negation, and none holds "no" or "yes" inside another word's meaning ("abnormal" is
avoided): readers that look for "no" in an echoed question would find it there.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef
from vilam3_jax.datasets.conversations import conversation, question_meta
from vilam3_jax.datasets.dataset import Context, SkipItem
from vilam3_jax.datasets.label_sentences import NORMAL, describe

Known = tuple[tuple[str, bool], ...]  # (finding, present)
YES_NO = ("yes", "no")
EXPERT = "CXR"

# Finding, as question type → noun phrase.
PHRASES = {
    "airspace_opacity": "an airspace opacity",
    "atelectasis": "atelectasis",
    "cardiomegaly": "an enlarged heart",
    "consolidation": "consolidation",
    "edema": "pulmonary edema",
    "emphysema": "emphysema",
    "enlarged_cardiomediastinum": "a widened mediastinum",
    "fibrosis": "pulmonary fibrosis",
    "fracture": "a fracture",
    "hernia": "a hiatal hernia",
    "infiltration": "an infiltrate",
    "lung_lesion": "a lung lesion such as a mass or nodule",
    "lung_opacity": "a lung opacity",
    "mass": "a mass",
    "nodule": "a nodule",
    "nodule_or_mass": "a nodule or mass",
    "pleural_effusion": "a pleural effusion",
    "pleural_other": "a pleural disease besides effusion",
    "pleural_thickening": "pleural thickening",
    "pneumonia": "pneumonia",
    "pneumothorax": "a pneumothorax",
    "support_devices": "a support device such as a tube or line",
}
# The first wording is the canonical one: evaluation asks with it.
_WORDINGS = (
    "Does this chest X-ray show {phrase}?",
    "Is there {phrase} on this chest X-ray?",
    "Can you see {phrase} on this film?",
    "Is {phrase} visible on this chest radiograph?",
)
_NORMAL_WORDINGS = (
    "Does this chest X-ray look normal?",
    "Is this a normal chest X-ray?",
    "Would you call this film normal?",
)
_ANSWER_FORM = " Answer yes or no."
# VILA-M3's names of what it evaluates, see `reference_question`.
_REFERENCE_NAMES = {"airspace_opacity": "lung opacity"}
# What the ensemble of `docs/experts_cxr.md` gives a probability for.
_EXPERT_KNOWS = frozenset(PHRASES) - {"pleural_other", "support_devices", "nodule_or_mass"}


@dataclasses.dataclass(frozen=True)
class Ask:
    """How films of a split are asked about.

    Attributes:
      most: questions for one film; 0: one for each known finding, in canonical words and order, as evaluation
        needs them.
      label_source: whose word the labels are.
      frontal: the films are frontal, so the film expert may be asked.
      reference: the questions are worded as VILA-M3's.
      weights: see `answer_weights`; for training.
    """

    most: int = 0
    label_source: str = "dataset"
    frontal: bool = True
    reference: bool = False
    weights: Mapping[tuple[str, bool], float] = dataclasses.field(default_factory=dict)


def reference_question(finding: str) -> str:
    """VILA-M3's yes/no question about a finding, without the image marker (spec: classification prompts)."""
    name = _REFERENCE_NAMES.get(finding, finding.replace("_", " "))
    return (
        "The following is a question about findings in chest X-ray in the frontal view. "
        f"Please reply with yes or no.\nQuestion: is there {name} according to the provided X-ray image?\n"
    )


def question(finding: str, rng: random.Random | None = None) -> str:
    """A yes/no question about a finding of `PHRASES` or `NORMAL`.

    Args:
      finding: what is asked about.
      rng: picks the wording; None: the canonical one.
    """
    wordings = _NORMAL_WORDINGS if finding == NORMAL else _WORDINGS
    wording = wordings[0] if rng is None else rng.choice(wordings)
    return wording.format(phrase=PHRASES.get(finding, "")) + _ANSWER_FORM


def film_example(
    name: str,
    image: ImageRef,
    states: Mapping[str, bool | None],
    meta: Mapping[str, Any],
    context: Context,
    ask: Ask,
) -> Example:
    """A dialogue of yes/no questions about one film.

    Args:
      name: the record's id.
      image: the film.
      states: finding → it is there, it is not, or nobody knows (None: not asked about).
      meta: of `conversations.metadata`.
      context: of the split.
      ask: how many questions, in which words.

    Raises:
      SkipItem: nothing is known of the film.
    """
    known = known_labels(states)
    if not known:
        raise SkipItem("no finding is labelled present or absent")
    rng = context.rng(name, "questions") if ask.most else None
    exchanges, questions = [], []
    for finding, there in known if rng is None else chosen_findings(known, rng, ask):
        text = reference_question(finding) if ask.reference else question(finding, rng)
        answer = YES_NO[0] if there else YES_NO[1]
        exchanges.append((text, answer.capitalize()))
        asked = question_meta(text, answer, finding, options=YES_NO, label_source=ask.label_source)
        knows = ask.frontal and finding in _EXPERT_KNOWS
        questions.append({**asked, "expert": EXPERT if knows else None})
    example = conversation(name, [image], exchanges, meta, questions=questions)
    return with_film_expert(example) if ask.frontal else example


def with_film_expert(example: Example) -> Example:
    """`example`, of one film, with the film expert's result before the first answer where there is one."""
    answer = next(index for index, turn in enumerate(example.turns) if turn.role == "assistant")
    request = ExpertRequest(EXPERT, before_turn=answer, policy="optional")
    return dataclasses.replace(example, expert_requests=(request,))


def answer_weights(films: Mapping[Known, int]) -> dict[tuple[str, bool], float]:
    """How often a label is asked about, so that each finding is answered yes as often as no.

    Args:
      films: what is known of a film → how many such films there are.

    Returns:
      (finding, present) → the share of its films that are asked: 1 for the rarer answer.
    """
    counts = collections.Counter()
    for known, number in films.items():
        for label in known:
            counts[label] += number
    return {
        (finding, there): min(1.0, counts[finding, not there] / count)
        for (finding, there), count in counts.items()
    }


def known_labels(states: Mapping[str, bool | None]) -> Known:
    """(finding, present) of what is known."""
    return tuple((finding, there) for finding, there in states.items() if there is not None)


def chosen_findings(
    known: Sequence[tuple[str, bool]], rng: random.Random, ask: Ask
) -> list[tuple[str, bool]]:
    """Up to `ask.most` labels in random order, each with its weight; at least one."""
    weights = ask.weights
    kept = [label for label in known if rng.random() < weights.get(label, 1.0)]
    kept = kept or [max(known, key=lambda label: weights.get(label, 1.0))]
    rng.shuffle(kept)
    return kept[: ask.most]


def film_caption(states: Mapping[str, bool | None], rng: random.Random | None) -> str:
    """The sentence of a film for contrastive training, see `label_sentences.describe`.

    Raises:
      SkipItem: nothing is known of the film.
    """
    if not any(there is not None for there in states.values()):
        raise SkipItem("no finding is labelled present or absent")
    return describe(states, rng, modality="CXR")


def add_wording(parser: argparse.ArgumentParser) -> None:
    """Declares `--wording`, of the sentences of image-text pairs."""
    parser.add_argument(
        "--wording",
        choices=("varied", "canonical"),
        default="varied",
        help="sentences of pairs: varied with definitions, or one per combination of labels, so that the "
        "contrastive loss takes equal sentences for one class (varied)",
    )


def column_names(findings: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Finding → accepted headers of its column: its name in words, and its aliases."""
    return {finding: (finding.replace("_", " "), *aliases.get(finding, ())) for finding in findings}
