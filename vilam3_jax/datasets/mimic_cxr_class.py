"""MIMIC-CXR classification: questions about 13 findings of MIMIC-CXR-JPG."""

from __future__ import annotations

import argparse
import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets.chest_findings import (
    NORMAL,
    Ask,
    Known,
    add_wording,
    answer_weights,
    column_names,
    film_caption,
    film_example,
    known_labels,
    reference_question,
    with_film_expert,
)
from vilam3_jax.datasets.conversations import conversation, pair, question_meta
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.mimic_cxr import (
    FRONTAL,
    IMAGES,
    JPG_FOLDERS,
    JPG_INSTRUCTIONS,
    Film,
    MimicDataset,
    alternatives,
    film_image,
    film_meta,
    films_of,
    jpg_folder,
    jpg_tables,
    number_of,
    required,
    row_of,
    views_of,
)
from vilam3_jax.datasets.source_files import SourceFolder

# In the order of the reference's letters.
FINDINGS = (
    "atelectasis",
    "cardiomegaly",
    "consolidation",
    "edema",
    "enlarged_cardiomediastinum",
    "fracture",
    "lung_lesion",
    "lung_opacity",
    "pleural_effusion",
    "pleural_other",
    "pneumonia",
    "pneumothorax",
    "support_devices",
)
_COLUMNS = (*FINDINGS, NORMAL)
_LETTERS = "ABCDEFGHIJKLMN"
_ALIASES = {"lung_opacity": ("Airspace Opacity",), NORMAL: ("No Findings",)}
# Presence of a device says nothing of disease, so "No Finding" leaves it open.
_DISEASES = frozenset(FINDINGS) - {"support_devices"}
_QUESTIONS_PER_FILM = 8

_VALUES = {"1": "1", "0": "0", "-1": "u", "": " ", "nan": " "}
_USUAL = {"1.0": "1", "0.0": "0", "-1.0": "u", "": " "}  # spellings of the release, for speed
_UNREADABLE, _TWICE = "x" * 14, "d" * 14

# How often each finding is positive in the reference's training split, and how many films have none of them:
# the reference keeps a film by them.
_REFERENCE_COUNTS = (
    *(47629, 46373, 11231, 28339, 7456, 4675, 6436, 53254, 56118, 2005, 16757, 11046, 71447),
    80000,
)
_REFERENCE_KEPT = 5000


class Item(NamedTuple):
    """A film and the labels of its study.

    Attributes:
      row: of the split table.
      film: its ids.
      labels: a character for each of `FINDINGS` and one for "No Finding": "1", "0", "u" (uncertain) or " "
        (not mentioned); "" if the study has none.
      expert_read: the labels are a radiologist's.
    """

    row: int
    film: Film
    labels: str
    expert_read: bool


class MimicCxrClass(MimicDataset):
    """Labels are of studies, so all films of a study share them; frontal films are taken.

    Where this differs from the reference, which `parity` puts back:
    - a label that is uncertain or blank is no "no": it is not asked about. "No Finding" makes every disease a
      "no". The reference takes everything but 1.0 for "no".
    - lateral films are not asked about "in the frontal view".
    - the training split has all films, and each finding is asked about as often where it is there as where it
      is not. The reference keeps a film with the probability of its rarest finding.
    - the test split has radiologists' labels.
    - a film is one record: the reference repeats it for each of its 15 samples.
    """

    has_parity = True
    name = "mimic_cxr_class"
    description = "MIMIC-CXR-JPG with questions about 13 findings, labels from reports and of radiologists."
    configs: ClassVar[Mapping[str, str]] = {
        "binary": "yes/no questions about each finding",
        "multiple_choice": "one question whose answer is the letters of the findings",
        "pairs": "image-text pairs: a sentence made of the labels",
    }
    instructions = (
        f"{JPG_INSTRUCTIONS}: mimic-cxr-2.0.0-{{split,metadata,chexpert}}.csv.gz (negbio with "
        "--labels negbio) and mimic-cxr-2.1.0-test-set-labeled.csv (not with --test-labels labeler)."
    )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares --labels, --test-labels and --wording."""
        super().add_arguments(parser)
        add_wording(parser)
        parser.add_argument("--labels", choices=("chexpert", "negbio"), default="chexpert", help="labeler")
        parser.add_argument(
            "--test-labels",
            choices=("radiologist", "labeler"),
            default="radiologist",
            help="test films: the 687 studies that radiologists read, or all with the labeler's labels",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Joins films with the labels of their studies."""
        read = self.options.test_labels == "radiologist"
        wanted: list[list[str]] = jpg_tables("split", "metadata", self.options.labels)
        if read:
            wanted.append(alternatives(JPG_FOLDERS, "mimic-cxr-2.1.0-test-set-labeled.csv"))
        table, views, labels, *test = required(source, *wanted)
        films = films_of(source, table, views_of(source, views))
        known = labels_of(source, labels)
        tested = labels_of(source, test[0]) if test else known

        def items(name: str, of_split: list[Film]) -> list[Item]:
            labels, expert_read = (tested, read) if name == "test" else (known, False)
            return [Item(film.row, film, labels.get(film.study, ""), expert_read) for film in of_split]

        found = {name: items(name, of_split) for name, of_split in films.items()}
        make = functools.partial(
            _examples,
            folder=jpg_folder(source),
            form=self.config,
            views=self.options.views,
            weights=_weights(found.get("train", ()), self.options.views),
            varied=self.options.wording == "varied",
        )
        return {
            name: Split(of_split, make, functools.partial(row_of, table), IMAGES[name])
            for name, of_split in found.items()
        }


def _weights(items: Sequence[Item], views: str) -> dict[tuple[str, bool], float]:
    """`answer_weights` of the films that are asked about."""
    alike = collections.Counter(item.labels for item in items if views == "all" or item.film.view in FRONTAL)
    known: collections.Counter[Known] = collections.Counter()
    for labels, number in alike.items():
        if problem_of(labels) is None:
            known[known_labels(states_of(labels))] += number
    return answer_weights(known)


def labels_of(source: SourceFolder, table: str) -> dict[str, str]:
    """Study → its labels, as in `Item.labels`.

    A study with a value that is no label has only "x"; one that stands twice with other labels only "d".
    """
    columns = {"study": ("study_id",), **column_names(_COLUMNS, _ALIASES)}
    known: dict[str, str] = {}
    same: dict[str, str] = {}
    for row in source.table(table, columns):
        values = [_USUAL.get(row[name]) or _VALUES.get(_label(row[name])) for name in _COLUMNS]
        labels = _UNREADABLE if None in values else "".join(map(str, values))
        labels = same.setdefault(labels, labels)
        study = number_of(row["study"], "s")
        known[study] = labels if known.get(study, labels) == labels else _TWICE
    known.pop("", None)
    return known


def _label(cell: str) -> str:
    return cell.strip().lower().removesuffix(".0")


def _examples(
    item: Item,
    context: Context,
    *,
    folder: str,
    form: str,
    views: str,
    weights: Mapping[tuple[str, bool], float],
    varied: bool,
) -> Iterator[Example]:
    if not item.film.problem:
        if item.expert_read and not item.labels:
            return  # most test studies were not read by radiologists
        reference = context.parity and form != "pairs"  # the reference has no pairs
        if views == "frontal" and item.film.view not in FRONTAL and not reference:
            return
        if problem := problem_of(item.labels):
            raise SkipItem(problem)
        if reference and context.split == "train" and not _reference_keeps(item, context):
            return
    image = film_image(context, folder, item.film)
    source = "radiologist" if item.expert_read else "labeler"
    meta = film_meta(context, item.film, label_source=source)
    if form == "pairs":
        rng = context.rng(item.film.dicom, "caption") if varied else None
        caption = film_caption(states_of(item.labels), rng)
        yield pair(item.film.dicom, image, caption, meta, kind="pair")
    elif context.parity:
        make = _reference_binary if form == "binary" else _reference_choice
        yield from make(item, image, meta, source)
    elif form == "binary":
        ask = Ask(
            most=_QUESTIONS_PER_FILM if context.split == "train" else 0,
            label_source=source,
            frontal=item.film.view in FRONTAL,
            weights=weights,
        )
        yield film_example(item.film.dicom, image, states_of(item.labels), meta, context, ask)
    else:
        yield _choice(item, image, meta, source)


def problem_of(labels: str) -> str | None:
    """Why labels, as of `Item.labels`, cannot be used, or None."""
    if not labels:
        return "its study has no labels"
    if labels == _UNREADABLE:
        return "a label of its study is none of 1.0, 0.0, -1.0 and blank"
    if labels == _TWICE:
        return "its study stands in the labels twice with different values"
    if not labels.strip():
        return "its study has no label that is not blank"
    states = zip(FINDINGS, labels, strict=False)
    if labels[-1] == "1" and any(label == "1" and name in _DISEASES for name, label in states):
        return "its study is labelled both with a finding and with none"
    return None


def states_of(labels: str) -> dict[str, bool | None]:
    """Finding → there, not there, or unknown (None).

    >>> states_of(" " * 13 + "1")["edema"], states_of("u" * 14)["edema"]
    (False, None)
    """
    states = {name: {"1": True, "0": False}.get(label) for name, label in zip(_COLUMNS, labels, strict=True)}
    if states[NORMAL]:
        states |= {name: False for name in _DISEASES if states[name] is None}
    elif any(states[name] for name in _DISEASES):
        states[NORMAL] = False
    return states


def _choice(item: Item, image: ImageRef, meta: dict, source: str) -> Example:
    if "u" in item.labels[:-1]:
        raise SkipItem("a label of its study is uncertain, so the list of findings is not known")
    letters = [f"({_LETTERS[k]})" for k, label in enumerate(item.labels[:-1]) if label == "1"]
    if not letters and item.labels[-1] != "1":
        raise SkipItem("its study has neither a finding nor the label that there is none")
    frontal = item.film.view in FRONTAL
    question, answer = choice_question(frontal), ", ".join(letters or ["(N)"])
    options = [f"({letter})" for letter in _LETTERS]
    qa = question_meta(question, answer, "findings", options=options, label_source=source)
    example = conversation(item.film.dicom, [image], [(question, answer)], meta, questions=[qa])
    return with_film_expert(example) if frontal else example


def choice_question(frontal: bool = True) -> str:
    """VILA-M3's multiple-choice question, without the image marker (spec: classification).

    Args:
      frontal: the film is; of others the view is not named.
    """
    names = [*(_words(name).capitalize() for name in FINDINGS), "None of the above"]
    listed = "".join(f"({letter}) {name}\n" for letter, name in zip(_LETTERS, names, strict=True))
    view = " in the frontal view" if frontal else ""
    return (
        f"The following is a multiple-choice question about findings in chest X-ray{view}. Please reply with "
        "the corresponding answer choice letter(s).\nQuestion: What are the potential abnormalities "
        f"according to the provided X-ray image?\n{listed}"
    )


def _words(finding: str) -> str:
    return finding.replace("_", " ")


def _reference_keeps(item: Item, context: Context) -> bool:
    """A film is kept if the draw is below 5000 / frequency of any of its findings; the same draw for all."""
    positive = [count for count, label in zip(_REFERENCE_COUNTS, item.labels, strict=True) if label == "1"]
    if "1" not in item.labels[:-1]:
        positive = [_REFERENCE_COUNTS[-1]]
    return context.rng(item.film.dicom, "kept").random() < _REFERENCE_KEPT / min(positive)


def _reference_binary(item: Item, image: ImageRef, meta: dict, source: str) -> Iterator[Example]:
    for finding, label in zip(FINDINGS, item.labels, strict=False):
        question, answer = reference_question(finding), "Yes" if label == "1" else "No"
        qa = question_meta(question, answer, finding, options=("Yes", "No"), label_source=source)
        name = f"{item.film.dicom}/{finding}"
        yield conversation(name, [image], [(question, answer)], meta, questions=[qa])


def _reference_choice(item: Item, image: ImageRef, meta: dict, source: str) -> Iterator[Example]:
    names = [_words(name).capitalize() for name in FINDINGS]
    chosen = [k for k, label in enumerate(item.labels[:-1]) if label == "1"]
    letters = ",".join(f"({_LETTERS[k]})" for k in chosen) or "(N)"
    named = ",".join(f"({_LETTERS[k]}) {names[k]}" for k in chosen) or "(N) None of the above"
    for form, answer in (("letters", letters), ("names", named)):
        question = choice_question()
        qa = question_meta(question, answer, "findings", label_source=source)
        name = f"{item.film.dicom}/{form}"
        yield conversation(name, [image], [(question, answer)], meta, questions=[qa])
