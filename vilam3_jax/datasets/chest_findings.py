"""Questions about findings on chest X-rays, generated from labels.

Questions contain neither negations nor "abnormal": answer parsers that search for "no" would match a repeated
question.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, RequestImage
from vilam3_jax.datasets.conversations import YES_NO, conversation, metadata, pair, question_meta
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem
from vilam3_jax.datasets.label_sentences import NORMAL, describe
from vilam3_jax.datasets.subgroups import age_band, sex_of
from vilam3_jax.errors import UserError

States = Mapping[str, bool | None]  # finding → present, absent or unknown
Label = tuple[str, bool]  # (finding, present)
EXPERT = "CXR"

# Labels of the CheXpert labeler, in the order of CheXpert's files.
CHEXPERT_FINDINGS: tuple[str, ...] = (
    NORMAL,
    "enlarged_cardiomediastinum",
    "cardiomegaly",
    "lung_opacity",
    "lung_lesion",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural_effusion",
    "pleural_other",
    "fracture",
    "support_devices",
)
# Finding → accepted column headers.
CHEXPERT_COLUMNS = {finding: (finding.replace("_", " "),) for finding in CHEXPERT_FINDINGS} | {
    "lung_opacity": ("lung opacity", "Airspace Opacity"),
    NORMAL: ("no finding", "No Findings"),
}
# Finding (question type) → noun phrase.
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
# The first wording is canonical: evaluation uses it.
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
# VILA-M3's names of findings, see `reference_question`.
_REFERENCE_NAMES = {"airspace_opacity": "lung opacity"}
# Findings predicted by the ensemble of `docs/experts_cxr.md`.
_EXPERT_FINDINGS = frozenset(PHRASES) - {"pleural_other", "support_devices", "nodule_or_mass"}

_T = TypeVar("_T", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class FilmOptions:
    """How the films of a split become records.

    Attributes:
      limit: maximum number of questions per film; 0 for all known findings in canonical wording and order,
        as evaluation requires.
      label_source: origin of the labels.
      frontal: the films are frontal, so the film expert may be asked.
      reference: use VILA-M3's wording.
      weights: of `answer_weights`, for training.
      pairs: make image-text pairs instead of questions.
      varied: vary the sentences of pairs.
    """

    limit: int = 0
    label_source: str = "dataset"
    frontal: bool = True
    reference: bool = False
    weights: Mapping[Label, float] = dataclasses.field(default_factory=dict)
    pairs: bool = False
    varied: bool = True


def reference_question(finding: str) -> str:
    """Returns VILA-M3's yes/no question, without the image marker (spec: classification prompts)."""
    name = _REFERENCE_NAMES.get(finding, finding.replace("_", " "))
    return (
        "The following is a question about findings in chest X-ray in the frontal view. "
        f"Please reply with yes or no.\nQuestion: is there {name} according to the provided X-ray image?\n"
    )


def question(finding: str, rng: random.Random | None = None) -> str:
    """Returns a yes/no question about a finding of `PHRASES` or `NORMAL`, canonical without `rng`."""
    wordings = _NORMAL_WORDINGS if finding == NORMAL else _WORDINGS
    wording = wordings[0] if rng is None else rng.choice(wordings)
    return wording.format(phrase=PHRASES.get(finding, "")) + _ANSWER_FORM


def film_record(
    name: str,
    image: ImageRef,
    states: States,
    meta: Mapping[str, Any],
    context: Context,
    options: FilmOptions,
) -> Example:
    """Returns a conversation of yes/no questions about the known labels of a film, or an image-text pair.

    Raises:
      SkipItem: all labels are unknown.
    """
    known = known_labels(states)
    if not known:
        raise SkipItem("no finding is labelled present or absent")
    if options.pairs:
        rng = context.rng(name, "caption") if options.varied else None
        return pair(name, image, describe(states, rng, modality="CXR"), meta, kind="pair")
    rng = context.rng(name, "questions") if options.limit else None
    exchanges, questions = [], []
    for finding, present in known if rng is None else chosen_findings(known, rng, options):
        text = reference_question(finding) if options.reference else question(finding, rng)
        answer = YES_NO[0] if present else YES_NO[1]
        exchanges.append((text, answer.capitalize()))
        qa = question_meta(text, answer, finding, options=YES_NO, label_source=options.label_source)
        expert = EXPERT if options.frontal and finding in _EXPERT_FINDINGS else None
        questions.append({**qa, "expert": expert})
    example = conversation(name, [image], exchanges, meta, questions=questions)
    return with_film_expert(example) if options.frontal else example


def film_meta(
    context: Context, film: Any, states: States, options: FilmOptions, *, patient: str, view: str
) -> dict[str, Any]:
    """Returns the metadata of a film with cells `sex` and `age`; `view` may be ""."""
    return metadata(
        context,
        modality="CXR",
        patient=patient,
        view=view or None,
        sex=sex_of(film.sex),
        age_band=age_band(film.age),
        label_source=options.label_source,
        findings=[finding for finding, present in states.items() if present],
    )


def film_name(film: Any) -> str:
    """Returns the name of a film, by `source` and `row`, for messages."""
    return f"{film.source} row {film.row}"


def with_film_expert(example: Example, image: int = 0) -> Example:
    """Requests the film expert's result for one image, if available, before the first answer."""
    answer = next(index for index, turn in enumerate(example.turns) if turn.role == "assistant")
    request = ExpertRequest(EXPERT, images=(RequestImage(image),), before_turn=answer, policy="optional")
    return dataclasses.replace(example, expert_requests=(request,))


def answer_weights(labels: Iterable[_T], states_of: Callable[[_T], States]) -> dict[Label, float]:
    """Returns sampling weights of labels that balance yes and no for each finding.

    Args:
      labels: labels of all films, in any form.
      states_of: converts the labels of a film; may raise `SkipItem`.

    Returns:
      (finding, present) → probability of asking: 1 for the rarer answer.
    """
    counts: collections.Counter[Label] = collections.Counter()
    for one, number in collections.Counter(labels).items():
        with contextlib.suppress(SkipItem):
            for label in known_labels(states_of(one)):
                counts[label] += number
    return {
        (finding, present): min(1.0, counts[finding, not present] / count)
        for (finding, present), count in counts.items()
    }


def known_labels(states: States) -> list[Label]:
    """Returns the labels that are not unknown."""
    return [(finding, present) for finding, present in states.items() if present is not None]


def chosen_findings(known: Sequence[Label], rng: random.Random, options: FilmOptions) -> list[Label]:
    """Samples up to `options.limit` labels by weight, at least one, in random order."""
    weights = options.weights
    kept = [label for label in known if rng.random() < weights.get(label, 1.0)]
    kept = kept or [max(known, key=lambda label: weights.get(label, 1.0))]
    rng.shuffle(kept)
    return kept[: options.limit]


def add_wording(parser: argparse.ArgumentParser) -> None:
    """Declares `--wording`, for the sentences of image-text pairs."""
    parser.add_argument(
        "--wording",
        choices=("varied", "canonical"),
        default="varied",
        help="sentences of pairs: varied with definitions, or one per combination of labels, so that the "
        "contrastive loss treats equal sentences as one class (default: varied)",
    )


class FilmDataset(Dataset):
    """Base class of datasets of chest films with labelled findings; the variant "pairs" makes pairs."""

    findings: ClassVar[tuple[str, ...]]

    def __init__(self, options: argparse.Namespace | None = None, config: str = "") -> None:
        """Raises `UserError` if `--questions` is out of range."""
        super().__init__(options, config)
        if not 1 <= self.options.questions <= len(self.findings):
            raise UserError(f"--questions {self.options.questions}: give 1 to {len(self.findings)}")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--questions` and `--wording`."""
        parser.add_argument("--questions", type=int, default=8, help="maximum per training film (default: 8)")
        add_wording(parser)

    def film_options(self, label_source: str, weights: Mapping[Label, float] | None = None) -> FilmOptions:
        """Returns the options of a split; `weights` of training films, None for evaluation."""
        return FilmOptions(
            limit=0 if weights is None else self.options.questions,
            label_source=label_source,
            weights=weights or {},
            pairs=self.config == "pairs",
            varied=self.options.wording == "varied",
        )
