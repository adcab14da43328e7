"""MIMIC-CXR classification: questions about 13 findings of MIMIC-CXR-JPG."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import chest_findings, mimic_cxr
from vilam3_jax.datasets.chest_findings import CHEXPERT_COLUMNS, NORMAL, FilmOptions
from vilam3_jax.datasets.conversations import question_conversation, question_meta
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.mimic_cxr import FRONTAL, Film, MimicDataset, number_of
from vilam3_jax.datasets.source_files import SourceFolder

# Alphabetical, in the order of the reference's letters.
FINDINGS = tuple(sorted(chest_findings.CHEXPERT_FINDINGS[1:]))
_COLUMNS = (*FINDINGS, NORMAL)
_LETTERS = "ABCDEFGHIJKLMN"
_NAMES = [finding.replace("_", " ").capitalize() for finding in FINDINGS]
# "No Finding" does not exclude support devices.
_DISEASES = frozenset(FINDINGS) - {"support_devices"}
_QUESTIONS_PER_FILM = 8

_VALUES = {"1": "1", "0": "0", "-1": "u", "": " ", "nan": " "}
_USUAL = {"1.0": "1", "0.0": "0", "-1.0": "u", "": " "}  # spellings of the release, for speed
_UNREADABLE, _CONTRADICTORY = "x" * 14, "d" * 14

# Films with each finding, and with none, in the reference's training split; see `_reference_keeps`.
_REFERENCE_COUNTS = (
    *(47629, 46373, 11231, 28339, 7456, 4675, 6436, 53254, 56118, 2005, 16757, 11046, 71447),
    80000,
)
_REFERENCE_KEPT = 5000


class Item(NamedTuple):
    """A film and the labels of its study.

    `labels` has "1", "0", "u" (uncertain) or " " (not mentioned) for each of `FINDINGS` and "No Finding"; it
    is "" if the study has none.
    """

    row: int  # of the split table
    film: Film
    labels: str
    by_radiologist: bool


class MimicCxrClass(MimicDataset):
    """Questions about findings on frontal films; the films of a study share its labels.

    Differences from the reference, which `parity` reverts:
    - Uncertain and blank labels are unknown and not asked about; "No Finding" means that all diseases are
      absent. The reference treats everything but 1.0 as "no".
    - Questions about lateral films do not mention "the frontal view".
    - All training films are used, and answers are balanced for each finding. The reference keeps a film with
      the probability of its rarest finding.
    - Test labels are those of radiologists.
    - A film is one record; the reference repeats it for each of its 15 samples.
    """

    has_parity = True
    name = "mimic_cxr_class"
    description = "MIMIC-CXR-JPG with questions about 13 findings, labels from reports and by radiologists."
    configs: ClassVar[Mapping[str, str]] = {
        "binary": "yes/no questions about each finding",
        "multiple_choice": "one question, answered by the letters of the findings",
        "pairs": "image-text pairs: a sentence generated from the labels",
    }
    instructions = (
        f"{mimic_cxr.JPG_INSTRUCTIONS}: mimic-cxr-2.0.0-{{split,metadata,chexpert}}.csv.gz (negbio with "
        "--labels negbio) and mimic-cxr-2.1.0-test-set-labeled.csv (not with --test-labels labeler)."
    )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        chest_findings.add_wording(parser)
        parser.add_argument("--labels", choices=("chexpert", "negbio"), default="chexpert", help="labeler")
        parser.add_argument(
            "--test-labels",
            choices=("radiologist", "labeler"),
            default="radiologist",
            help="test films: the 687 studies labelled by radiologists, or all with the labeler's labels",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        by_radiologist = self.options.test_labels == "radiologist"
        wanted = mimic_cxr.jpg_tables("split", "metadata", self.options.labels)
        if by_radiologist:
            test_table = "mimic-cxr-2.1.0-test-set-labeled.csv"
            wanted.append(mimic_cxr.alternatives(mimic_cxr.JPG_FOLDERS, test_table))
        table, views, labels, *test = mimic_cxr.required(source, *wanted)
        films = mimic_cxr.films_of(source, table, mimic_cxr.views_of(source, views))
        known = _labels_of(source, labels)
        tested = _labels_of(source, test[0]) if test else known

        def items(name: str, of_split: list[Film]) -> list[Item]:
            labels, read = (tested, by_radiologist) if name == "test" else (known, False)
            return [Item(film.row, film, labels.get(film.study, ""), read) for film in of_split]

        found = {name: items(name, of_split) for name, of_split in films.items()}
        views = self.options.views
        train = (i.labels for i in found.get("train", ()) if views == "all" or i.film.view in FRONTAL)
        options = FilmOptions(
            limit=_QUESTIONS_PER_FILM,
            label_source="labeler",
            weights=chest_findings.answer_weights(train, states_of),
            pairs=self.config == "pairs",
            varied=self.options.wording == "varied",
        )
        make = functools.partial(_examples, folder=mimic_cxr.jpg_folder(source), views=views, options=options)
        name_of = functools.partial(mimic_cxr.row_of, table)
        return {
            name: Split(of_split, make, name_of, mimic_cxr.IMAGES[name]) for name, of_split in found.items()
        }


def _labels_of(source: SourceFolder, table: str) -> dict[str, str]:
    """Reads study → labels as in `Item.labels`: all "x" if a value is invalid, all "d" if rows differ."""
    columns = {"study": ("study_id",), **{name: CHEXPERT_COLUMNS[name] for name in _COLUMNS}}
    known: dict[str, str] = {}
    same: dict[str, str] = {}
    for row in source.table(table, columns):
        values = [
            _USUAL.get(row[name]) or _VALUES.get(row[name].strip().lower().removesuffix(".0"))
            for name in _COLUMNS
        ]
        labels = _UNREADABLE if None in values else "".join(map(str, values))
        labels = same.setdefault(labels, labels)
        study = number_of(row["study"], "s")
        known[study] = labels if known.get(study, labels) == labels else _CONTRADICTORY
    known.pop("", None)
    return known


def _examples(
    item: Item, context: Context, *, folder: str, views: str, options: FilmOptions
) -> Iterator[Example]:
    film, frontal = item.film, item.film.view in FRONTAL
    reference = context.parity and not options.pairs  # the reference has no pairs
    states = {}
    if not film.problem:
        if item.by_radiologist and not item.labels:
            return  # radiologists labelled only some of the test studies
        if views == "frontal" and not frontal and not reference:
            return
        states = states_of(item.labels)
        if reference and context.split == "train" and not _reference_keeps(item, context):
            return
    image = mimic_cxr.film_image(context, folder, film)
    source = "radiologist" if item.by_radiologist else "labeler"
    meta = mimic_cxr.film_meta(context, film, label_source=source)
    if reference:
        make = _reference_binary if context.config == "binary" else _reference_choice
        yield from make(item, image, meta, source)
    elif context.config == "multiple_choice":
        yield _choice(item, image, meta, source)
    else:
        limit = options.limit if context.split == "train" else 0
        options = dataclasses.replace(options, limit=limit, label_source=source, frontal=frontal)
        yield chest_findings.film_record(film.dicom, image, states, meta, context, options)


def states_of(labels: str) -> dict[str, bool | None]:
    """Converts labels, as in `Item.labels`, to finding → present, absent or unknown.

    >>> states_of(" " * 13 + "1")["edema"]
    False

    Raises:
      SkipItem: the labels are missing, invalid or contradictory.
    """
    if not labels:
        raise SkipItem("its study has no labels")
    if labels == _UNREADABLE:
        raise SkipItem("a label of its study is none of 1.0, 0.0, -1.0 and blank")
    if labels == _CONTRADICTORY:
        raise SkipItem("its study has rows of labels with different values")
    if not labels.strip():
        raise SkipItem("its study has only blank labels")
    states = {name: {"1": True, "0": False}.get(label) for name, label in zip(_COLUMNS, labels, strict=True)}
    if states[NORMAL] and any(states[name] for name in _DISEASES):
        raise SkipItem("its study is labelled both with a finding and with none")
    if states[NORMAL]:
        states |= {name: False for name in _DISEASES if states[name] is None}
    elif any(states[name] for name in _DISEASES):
        states[NORMAL] = False
    return states


def _choice(item: Item, image: ImageRef, meta: dict, source: str) -> Example:
    if "u" in item.labels[:-1]:
        raise SkipItem("a label of its study is uncertain, so the list of findings is unknown")
    letters = [f"({_LETTERS[k]})" for k, label in enumerate(item.labels[:-1]) if label == "1"]
    if not letters and item.labels[-1] != "1":
        raise SkipItem("its study has neither a finding nor the label No Finding")
    frontal = item.film.view in FRONTAL
    question, answer = _choice_question(frontal), ", ".join(letters or ["(N)"])
    options = [f"({letter})" for letter in _LETTERS]
    qa = question_meta(question, answer, "findings", options=options, label_source=source)
    example = question_conversation(item.film.dicom, [image], meta, [qa])
    return chest_findings.with_film_expert(example) if frontal else example


def _choice_question(frontal: bool = True) -> str:
    """Returns VILA-M3's multiple-choice question, without image marker (spec: classification prompts).

    Args:
      frontal: mention the frontal view, as the reference does.
    """
    names = zip(_LETTERS, [*_NAMES, "None of the above"], strict=True)
    listed = "".join(f"({letter}) {name}\n" for letter, name in names)
    view = " in the frontal view" if frontal else ""
    return (
        f"The following is a multiple-choice question about findings in chest X-ray{view}. Please reply with "
        "the corresponding answer choice letter(s).\nQuestion: What are the potential abnormalities "
        f"according to the provided X-ray image?\n{listed}"
    )


def _reference_keeps(item: Item, context: Context) -> bool:
    """Keeps a film if one draw is below 5000 / number of films of its rarest finding."""
    positive = [count for count, label in zip(_REFERENCE_COUNTS, item.labels, strict=True) if label == "1"]
    if "1" not in item.labels[:-1]:
        positive = [_REFERENCE_COUNTS[-1]]
    return context.rng(item.film.dicom, "kept").random() < _REFERENCE_KEPT / min(positive)


def _reference_binary(item: Item, image: ImageRef, meta: dict, source: str) -> Iterator[Example]:
    for finding, label in zip(FINDINGS, item.labels, strict=False):
        question, answer = chest_findings.reference_question(finding), "Yes" if label == "1" else "No"
        qa = question_meta(question, answer, finding, options=("Yes", "No"), label_source=source)
        yield question_conversation(f"{item.film.dicom}/{finding}", [image], meta, [qa])


def _reference_choice(item: Item, image: ImageRef, meta: dict, source: str) -> Iterator[Example]:
    chosen = [k for k, label in enumerate(item.labels[:-1]) if label == "1"]
    letters = ",".join(f"({_LETTERS[k]})" for k in chosen) or "(N)"
    named = ",".join(f"({_LETTERS[k]}) {_NAMES[k]}" for k in chosen) or "(N) None of the above"
    for form, answer in (("letters", letters), ("names", named)):
        qa = question_meta(_choice_question(), answer, "findings", label_source=source)
        yield question_conversation(f"{item.film.dicom}/{form}", [image], meta, [qa])
