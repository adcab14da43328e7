"""Medical-Diff-VQA: questions about findings in MIMIC-CXR studies, one conversation per film."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import mimic_cxr
from vilam3_jax.datasets.chest_findings import with_film_expert
from vilam3_jax.datasets.conversations import YES_NO, conversation, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, SkipItem, Skipped, Split
from vilam3_jax.datasets.mimic_cxr import FRONTAL, Film, MimicDataset, number_of, split_named
from vilam3_jax.datasets.source_files import SourceFolder

KINDS = ("abnormality", "location", "type", "level", "view", "presence")
DIFFERENCE = "difference"
_FOLDERS = ("", "medical-diff-vqa/1.0.0", "medical-diff-vqa", "physionet.org/files/medical-diff-vqa/1.0.0")
_BLANK = ("", "nan", "null")
_NO_REFERENCE = (*_BLANK, "0", "0.0", "none", "-1", "-1.0")
_MAX_TEXT = 10_000  # characters; the longest answers have hundreds
_ORDER = "The first image is the reference, the second one the current image."


class Question(NamedTuple):
    """A row of the question table."""

    row: int
    kind: str
    question: str
    answer: str


class Item(NamedTuple):
    """Questions about a film, or about the difference from an earlier film."""

    row: int  # of the first question
    film: Film
    reference: Film | None  # of the reference study, for differences
    questions: tuple[Question, ...]  # in the order of the table


class MedicalDiffVqa(MimicDataset):
    """A study is represented by its first AP or PA film in `mimic_all.csv`, otherwise by its first film.

    All questions about a film form one conversation, whatever their reference study. A question that is
    repeated with the same answer is asked once; with different answers it is skipped.

    The dataset's own split divides questions, so its splits share patients. By default, records have
    MIMIC-CXR's split of patients (`mimic_all.csv`); `--split-by file` selects the split of the paper, with
    about 129,000 training conversations. The reference's construction of conversations was not released.
    `parity` restores its rule for `answer_type`: an answer that contains "no", as in "nodule", is closed.
    """

    has_parity = True
    name = "medical_diff_vqa"
    description = (
        "Questions about abnormalities, their place, level and type, and about views of chest films."
    )
    homepage = "https://physionet.org/content/medical-diff-vqa/1.0.0/"
    citation = "Hu et al., Expert Knowledge-Aware Image Difference Graph Representation Learning, KDD 2023"
    configs: ClassVar[Mapping[str, str]] = {
        "questions": "the six types of questions about one film",
        "difference": "what has changed between two films of a patient",
    }
    instructions = (
        "From https://physionet.org/content/medical-diff-vqa/1.0.0/ (credentialed access): "
        f"mimic_pair_questions.csv and mimic_all.csv. {mimic_cxr.JPG_INSTRUCTIONS}."
    )

    def __init__(self, options: argparse.Namespace | None = None, config: str = "") -> None:
        super().__init__(options, config)
        if self.options.split_by == "file":
            # Applies only to this split.
            self.shared_images = "its own split divides questions, not patients"  # type: ignore[misc]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--split-by",
            choices=("mimic", "file"),
            default="mimic",
            help="MIMIC-CXR's split of patients, or the file's split of questions, which shares patients",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        tables = (mimic_cxr.alternatives(_FOLDERS, f"mimic_{name}.csv") for name in ("pair_questions", "all"))
        table, films_table = mimic_cxr.required(source, *tables)
        films = _films(source, films_table)
        by_file = self.options.split_by == "file"
        groups = _grouped(source, table, films, self.config == DIFFERENCE, by_file)
        if not by_file:
            groups = mimic_cxr.one_split_per_patient(groups)
        folder = mimic_cxr.jpg_folder(source)
        make = functools.partial(_examples, folder=folder, table=table, prefixed=by_file)
        name_of = functools.partial(mimic_cxr.row_of, table)
        return {name: Split(items, make, name_of) for name, items in groups.items()}


def _films(source: SourceFolder, table: str) -> dict[str, tuple[str, Film]]:
    """Reads study → (MIMIC-CXR's split, film)."""
    columns = {
        "subject": ("subject_id",),
        "study": ("study_id",),
        "dicom": ("dicom_id",),
        "view": ("view", "ViewPosition"),
        "split": ("split",),
    }
    chosen: dict[str, tuple[str, Film]] = {}
    for number, row in enumerate(source.table(table, columns), 1):
        subject, study = number_of(row["subject"], "p"), number_of(row["study"], "s")
        dicom, view = row["dicom"].strip(), mimic_cxr.view_named(row["view"])
        problem = mimic_cxr.film_problem(subject, study, dicom)
        if not study:
            continue  # no question can refer to it
        known = chosen.get(study)
        if known is None or (
            not problem and (known[1].problem or (view in FRONTAL and known[1].view not in FRONTAL))
        ):
            chosen[study] = split_named(row["split"]), Film(number, subject, study, dicom, view, problem)
    return chosen


def _grouped(
    source: SourceFolder, table: str, films: Mapping[str, tuple[str, Film]], difference: bool, by_file: bool
) -> dict[str, list[Item]]:
    """Groups questions to items by split, in the order of their first questions."""
    columns = {
        "subject": ("subject_id",),
        "study": ("study_id",),
        "reference": ("ref_id",),
        "kind": ("question_type",),
        "question": ("question",),
        "answer": ("answer",),
        "split": ("split",),
    }
    groups: dict[tuple[str, Film, Film | None], list[Question]] = {}
    same: dict[str, str] = {}  # saves memory: there are few distinct texts
    for number, row in enumerate(source.table(table, columns), 1):
        kind = row["kind"].strip().lower()
        if kind in (*KINDS, DIFFERENCE) and (kind == DIFFERENCE) != difference:
            continue
        split, film = _film_of(row["study"], row["subject"], number, films)
        reference = None
        if difference and not film.problem:
            reference, film = _reference_of(row["reference"], film, films)
        if by_file:
            split = split_named(row["split"])
        if not split:
            film = film._replace(problem=film.problem or "its split is unknown")
        texts = (same.setdefault(text, text) for text in (kind, row["question"], row["answer"]))
        groups.setdefault((split or "train", film, reference), []).append(Question(number, *texts))
    out: dict[str, list[Item]] = {}
    for (split, film, reference), questions in groups.items():
        out.setdefault(split, []).append(Item(questions[0].row, film, reference, tuple(questions)))
    return out


def _film_of(
    study: str, subject: str, number: int, films: Mapping[str, tuple[str, Film]]
) -> tuple[str, Film]:
    """Returns (split, film) of a study; the film may have a problem."""
    split, film = films.get(number_of(study, "s"), ("", None))
    if film is None:
        return split, Film(number, "", "", "", problem="its study is not in mimic_all.csv")
    if film.subject != number_of(subject, "p"):
        return split, Film(number, "", "", "", problem="its patient differs from mimic_all.csv")
    return split, film


def _reference_of(cell: str, film: Film, films: Mapping[str, tuple[str, Film]]) -> tuple[Film | None, Film]:
    """Returns (film of the reference study, `film` with any problem of the reference)."""
    if cell.strip().lower() in _NO_REFERENCE:
        return None, film._replace(problem="it has no reference study")
    _, reference = films.get(number_of(cell, "s"), ("", None))
    if reference is None:
        return None, film._replace(problem="its reference study is not in mimic_all.csv")
    if reference.subject != film.subject:
        return None, film._replace(problem="its reference study is of another patient")
    if reference.problem or reference.study == film.study:
        return None, film._replace(problem=reference.problem or "it is its own reference study")
    return reference, film


def _examples(
    item: Item, context: Context, *, folder: str, table: str, prefixed: bool
) -> Iterator[Example | Skipped]:
    if item.film.problem:
        for question in item.questions:
            yield Skipped(f"{table} row {question.row}", item.film.problem)
        return
    kept: list[Question] = []
    for result in _valid(item.questions, table):
        if isinstance(result, Skipped):
            yield result
        else:
            kept.append(result)
    if not kept:
        return
    films = [film for film in (item.reference, item.film) if film is not None]
    images = [mimic_cxr.film_image(context, folder, film) for film in films]
    name = "-".join(film.dicom for film in reversed(films))
    exchanges = [(question.question, question.answer) for question in kept]
    if item.reference is not None:
        exchanges[0] = (f"{_ORDER}\n{exchanges[0][0]}", exchanges[0][1])
    example = conversation(
        f"{context.split}/{name}" if prefixed else name,
        images,
        exchanges,
        mimic_cxr.film_meta(context, item.film, label_source="labeler"),
        questions=[_question_meta(question, context.parity, len(images) - 1) for question in kept],
        marker="after",
    )
    if item.film.view in FRONTAL:
        example = with_film_expert(example, len(images) - 1)
    yield example


def _valid(questions: Sequence[Question], table: str) -> Iterator[Question | Skipped]:
    """Yields valid questions without duplicates, and skipped ones."""
    answers: dict[str, set[frozenset[str]]] = {}
    for question in questions:
        if _problem(question) is None:
            answers.setdefault(_key(question.question), set()).add(_parts(question.answer))
    asked: set[str] = set()
    for question in questions:
        key = _key(question.question)
        problem = _problem(question)
        if problem is None and len(answers[key]) > 1:
            problem = "its question has different answers for the same film"
        if problem is not None:
            yield Skipped(f"{table} row {question.row}", problem)
        elif key not in asked:
            asked.add(key)
            texts = (text_of(text, "").strip() for text in (question.question, question.answer))
            yield Question(question.row, question.kind, *texts)


def _problem(question: Question) -> str | None:
    if question.kind not in (*KINDS, DIFFERENCE):
        return "its question_type is none of the seven"
    for what, text in (("question", question.question), ("answer", question.answer)):
        if text.strip().lower() in _BLANK:
            return f"the {what} is empty"
        if len(text) > _MAX_TEXT:
            return f"the {what} has {len(text)} characters; up to {_MAX_TEXT} are read"
        try:
            text_of(text, what)
        except SkipItem as reason:
            return str(reason)
    return None


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _parts(answer: str) -> frozenset[str]:
    """Returns the findings listed by an answer, whatever their order."""
    return frozenset(_key(part) for part in answer.split(","))


def _question_meta(question: Question, parity: bool, image: int) -> dict:
    first = _key(question.answer).strip(" .")
    closed = first in YES_NO
    is_closed = any(word in question.answer.lower() for word in YES_NO) if parity else closed
    qa = question_meta(
        question.question,
        first if closed else question.answer,
        question.kind,
        options=YES_NO if closed else (),
        label_source="labeler",
        image=image,
    )
    return {**qa, "answer_type": "closed" if is_closed else "open"}
