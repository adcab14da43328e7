"""The questions of an evaluation, grouped by image, with the answers of every arm beside each other."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vilam3_jax.data.experts.grammar import parse_turn
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from vilam3_jax.errors import UserError
from vilam3_jax.report import runs
from vilam3_jax.report.samples import RowImages, Samples, encode_jpeg
from vilam3_jax.runtime import paths

Row = Mapping[str, Any]

MAX_QUESTIONS = 1000  # by default: about 20 MB with one image per question


@dataclasses.dataclass(frozen=True)
class Question:
    """One question with the rows of the arms that were asked, in the order of the arms."""

    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image with its questions.

    Attributes:
      image: the image, or None.
      overlays: the same image with the labels of an expert, one for each result that an arm was shown.
      problem: why the image could not be read; '' if it was read, or if the page shows no images.
      questions: about the image.
    """

    image: RowImages | None
    overlays: tuple[RowImages, ...]
    problem: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the page shows.

    Attributes:
      arms: in the order of the page.
      entries: those shown.
      shown, total: numbers of questions.
      notes: sentences about folders that are missing or damaged.
    """

    arms: tuple[runs.Arm, ...]
    entries: tuple[Entry, ...]
    shown: int
    total: int
    notes: tuple[str, ...]


def collect(
    arms: Sequence[runs.Arm],
    *,
    limit: int = MAX_QUESTIONS,
    data: paths.PathLike | None = None,
    annotations: paths.PathLike | None = None,
) -> Answers:
    """Joins the arms by question and reads the images.

    Args:
      arms: evaluations of one protocol.
      limit: maximum number of questions. If there are more, those whose hash is smallest are shown, so the
        choice does not depend on the answers.
      data, annotations: folders of images and of annotations; None: those that `result.json` names.

    Raises:
      UserError: the arms ask different questions under one name.
    """
    questions = _questions(arms)
    chosen = sorted(sorted(questions, key=_hash)[:limit], key=_order)
    wanted = {item.rpartition("/q")[0] for item in chosen}
    samples, notes = _open(arms, wanted, data, annotations)
    return Answers(
        arms=tuple(arms),
        entries=tuple(_entries([questions[item] for item in chosen], samples)),
        shown=len(chosen),
        total=len(questions),
        notes=notes,
    )


def _questions(arms: Sequence[runs.Arm]) -> dict[str, Question]:
    """Item -> question."""
    rows: dict[str, list[Row]] = {}
    for arm in arms:
        for row in arm.rows:
            same = rows.setdefault(str(row["item"]), [])
            if same and any(same[0].get(key) != row.get(key) for key in ("question", "gold")):
                raise UserError(
                    f"{arm.name}: item {row['item']!r} is another question in {same[0]['arm']}; "
                    "give evaluations of the same data"
                )
            same.append(row)
    return {item: Question(tuple(own)) for item, own in rows.items()}


def _hash(item: str) -> bytes:
    return hashlib.sha256(item.encode("utf-8", "surrogatepass")).digest()


def _order(item: str) -> list[tuple[int, str]]:
    """Orders items by name, with numbers in numerical order, so that slices of one volume are adjacent."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", item)]


def _open(
    arms: Sequence[runs.Arm],
    wanted: Iterable[str],
    data: paths.PathLike | None,
    annotations: paths.PathLike | None,
) -> tuple[dict[str, Samples], tuple[str, ...]]:
    """(arm -> its data, for the arms whose data can be read; sentences about the others)."""
    opened: dict[tuple[str, str], Samples] = {}
    found: dict[str, Samples] = {}
    notes: list[str] = []
    for arm in arms:
        folder, store = (
            str(given if given is not None else arm.result.get(key) or "")
            for key, given in (("data", data), ("annotations", annotations))
        )
        if not folder or not paths.as_path(folder).is_dir():
            where = folder or f"the data of {arm.name}"
            notes.append(
                f"{where}: no such folder, so images are left out; start `vilam3 report` in the folder "
                "in which `vilam3 evaluate` was started."
            )
            continue
        if store and arm.experts != "off" and not paths.as_path(store).is_dir():
            notes.append(f"{store}: no such folder, so the labels of experts are left out.")
        # Arms without experts share the data of one with experts.
        same = [key for key in opened if key[0] == folder and store in ("", key[1])]
        key = same[0] if same else (folder, store)
        try:
            if key not in opened:
                opened[key] = Samples(
                    folder,
                    store or None,
                    split=arm.split,
                    wanted=frozenset(wanted),
                    preprocessing=_preprocessing(arm),
                    encode=encode_jpeg,
                )
        except UserError as error:
            notes.append(f"Images are left out: {error}.")
            continue
        found[arm.name] = opened[key]
    return found, tuple(dict.fromkeys(notes))


def _preprocessing(arm: runs.Arm) -> Preprocessing:
    """How the arm's model shows slices; the default if its export is not there."""
    export = arm.result.get("checkpoint")
    path = paths.as_path(str(export)) / "model.json"
    if not export or not path.exists():
        return DEFAULT_PREPROCESSING
    return Preprocessing.of(runs.read_json(path).get("preprocessing"))


def _entries(questions: Sequence[Question], samples: Mapping[str, Samples]) -> Iterable[Entry]:
    """Groups questions by image, in the order of the first question about each."""
    groups: dict[Any, list[Question]] = {}
    problems: dict[Any, str] = {}
    for question in questions:
        key: Any = ("no image", question.rows[0]["item"])
        if source := _source(question, samples):
            try:
                key = source.place(question.rows[0])
            except UserError as error:
                problems[key] = str(error)
        groups.setdefault(key, []).append(question)
    for key, same in groups.items():
        yield _entry(same, samples, problems.get(key, ""))


def _source(question: Question, samples: Mapping[str, Samples]) -> Samples | None:
    return next((samples[row["arm"]] for row in question.rows if row["arm"] in samples), None)


def _entry(questions: Sequence[Question], samples: Mapping[str, Samples], problem: str) -> Entry:
    image, overlays = None, []
    seen = set()
    # A row is rendered for its image if it is the first one, and for its overlay if no other has the same.
    for row in (row for question in questions for row in question.rows if not problem):
        if row["arm"] not in samples:
            continue
        calls = parse_turn(str(row.get("trigger") or "")).calls
        result = (id(samples[row["arm"]]), calls[-1:], row.get("falsify_seed"))
        if image is not None and (not calls or result in seen):
            continue
        seen.add(result)
        try:
            rendered = samples[row["arm"]].images(row)
        except UserError as error:
            return Entry(None, (), str(error), tuple(questions))
        image = image or rendered
        if rendered.overlay is not None:
            overlays.append(rendered)
    overlays.sort(key=lambda one: one.falsified)
    return Entry(image, tuple(overlays), problem, tuple(questions))
