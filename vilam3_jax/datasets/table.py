"""User-supplied tables of images and labels, converted to questions and answers."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef
from vilam3_jax.data.experts.cards import DEFAULT_LIST, load_cards
from vilam3_jax.datasets import parquet, table_experts, table_questions, user_data
from vilam3_jax.datasets.conversations import (
    conversation,
    free_question,
    metadata,
    question_meta,
    text_of,
)
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.image_files import image_or_dicom, stored_image
from vilam3_jax.datasets.record_files import digest
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.table_experts import TableCall
from vilam3_jax.datasets.table_questions import ONE_HOT, LabelColumn, cell_text
from vilam3_jax.datasets.user_data import STATED, TRAIN, UserFile
from vilam3_jax.errors import UserError, listed
from vilam3_jax.runtime import paths

_MAX_TEMPLATES = 16 << 20  # bytes
_MAX_VALUES = 100_000  # distinct cells counted per column to infer its kind
_HEADER_BYTES = 1 << 20
_BATCH = 8_192
_IMAGE_BATCH = 64
_MAX_NAME = 512


@dataclasses.dataclass(slots=True)
class _Row:
    number: int  # from 1, without the header
    id: str
    images: tuple[Any, ...]  # cells of the image columns; empty if the table stores the images
    labels: tuple[str, ...]
    question: str = ""  # with `--question`
    patient: str = ""
    problem: str = ""  # reason to skip the row
    place: parquet.Place | None = None  # if the table stores the images
    group: int = 0  # shared by rows with a common image or patient
    stored: tuple[int, ...] = ()  # digests of images stored in the table
    experts: str = ""  # cell of the expert column
    calls: tuple[TableCall, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Settings:
    root: str  # folder of the table
    columns: tuple[LabelColumn, ...]  # a single one for one-hot labels
    labels: tuple[str, ...]  # headers
    modality: str
    question: str  # header of the column of questions, or ""
    with_patient: bool
    one_hot: bool


class Table(UserFile):
    """Questions about images, from the labels of a table: 0/1, one-hot, numbers, classes or text.

    Every non-empty label gives a question with its answer. The kind of a column is inferred from its cells or
    set in the question file (`--questions`):
      - yes_no: 0/1, yes/no, true/false, positive/negative or present/absent;
      - choice: up to 20 distinct short texts or whole numbers, listed in the question; if there are more than
        five, each must occur twice on average;
      - number: other numbers;
      - text: everything else.
    Training rows vary the wording; other splits use the first one.

    With `--expert`, a column names the experts to call and before which answer, see `table_experts`.

    With `--question COLUMN`, a row states its question, and its label is the answer.

    Rows that share an image or, with `--patient`, a patient stay in one split. Splits are drawn by hash, so
    adding unrelated rows does not move a row to another split.
    """

    name = "table"
    description = "Questions about user-supplied images, from the labels of a CSV or parquet file."
    instructions = (
        "--source is a .csv, .tsv or .parquet file with a header; --image names the columns of image paths "
        "below --images, --label the label columns."
    )
    field, metavar = "column", "COLUMN"

    def __init__(self, options: argparse.Namespace | None = None, config: str = "") -> None:
        """Raises `UserError` if an option is missing or contradicts another."""
        super().__init__(options, config)
        given = self.options
        if given.split_by == "patient" and not given.patient:
            raise UserError("--split-by patient needs --patient COLUMN, the column that names the patient")
        if given.one_hot and len(given.label) < 2:
            raise UserError("--one-hot needs two --label columns or more")
        if given.question and (len(given.label) != 1 or given.questions or given.one_hot):
            raise UserError(
                "--question COLUMN needs one --label COLUMN, with the answers, and neither --questions nor "
                "--one-hot"
            )
        names = [name.strip().casefold() for name in given.label]
        if len(set(names)) != len(names):
            raise UserError(f"--label {' '.join(given.label)}: a column is named twice")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--image", nargs="+", default=[], metavar="COLUMN", help="columns of image paths or images"
        )
        parser.add_argument("--label", nargs="+", default=[], metavar="COLUMN", help="label columns")
        parser.add_argument(
            "--question", metavar="COLUMN", help="column of questions; the label column has the answers"
        )
        parser.add_argument("--one-hot", action="store_true", help="the label columns encode one class")
        parser.add_argument(
            "--questions", metavar="FILE.json", help="kinds and questions; see docs/datasets_chest.md"
        )
        parser.add_argument(
            "--expert",
            metavar="COLUMN",
            help="column of expert calls, such as 'CXR()' or 'CXR() before edema'",
        )
        parser.add_argument(
            "--cards", default=DEFAULT_LIST, help="card list of these experts (default: %(default)s)"
        )
        parser.add_argument("--id", metavar="COLUMN", help="column of record ids (default: image path)")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Reads the table once; stored images are only hashed."""
        given = self.options
        file = self.source_file(source)
        path = str(source.root / file)
        if not given.image or not given.label:
            raise UserError(f"{path}: give --image COLUMN and --label COLUMN. {self.instructions}")
        questions = given.questions
        content = {} if questions is None else user_data.read_json(questions, _MAX_TEMPLATES)
        templates = table_questions.read_templates(content, given.label, questions or "")
        if file.lower().endswith((".parquet", ".pq")):
            values = _read_parquet(source, file, self._columns())
        else:
            cells = source.table(file, self._columns(), delimiter=_delimiter(source, file))
            values = ((row, None) for row in cells)
        rows, stated, counts = _rows(values, given.label, path)
        if given.question:
            templates = {given.label[0]: {"kind": "text"}}
        if given.expert:
            _read_calls(rows, given, path)
        if given.one_hot:
            columns = [table_questions.one_hot_column(given.label, templates.get(ONE_HOT, {}))]
        else:
            columns = [
                table_questions.infer_column(label, cells, templates.get(label, {}))
                for label, cells in zip(given.label, counts, strict=True)
            ]
        settings = _Settings(
            str(source.root),
            tuple(columns),
            tuple(given.label),
            given.modality,
            given.question or "",
            with_patient=bool(given.patient),
            one_hot=given.one_hot,
        )
        make = functools.partial(_make, settings=settings)
        name_of = functools.partial(_name_of, file)
        _group(rows, with_patient=bool(given.patient))
        if given.split:
            sides = _stated(rows, stated, given.split, path)
        else:
            groups = np.array([row.group for row in rows], np.uint64)
            masks = user_data.held_out(groups, given.heldout, path)
            sides = {side: list(itertools.compress(rows, mask)) for side, mask in masks.items()}
        return {side: Split(found, make, name_of) for side, found in sides.items() if found}

    def _columns(self) -> dict[str, tuple[str]]:
        """Maps the keys of a row to headers."""
        given = self.options
        columns = {f"image {number}": (name,) for number, name in enumerate(given.image)}
        columns |= {f"label {number}": (name,) for number, name in enumerate(given.label)}
        single = {
            "question": given.question,
            "patient": given.patient,
            "split": given.split,
            "id": given.id,
            "expert": given.expert,
        }
        return columns | {key: (name,) for key, name in single.items() if name}


def _delimiter(source: SourceFolder, file: str) -> str:
    """Detects the delimiter of the header; a comma takes precedence over tab and semicolon."""
    if file.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    with (source.root / file).open("rb") as opened:
        header = opened.read(_HEADER_BYTES).partition(b"\n")[0]
    return next((mark for mark in (",", "\t", ";") if mark.encode() in header), ",")


def _read_parquet(
    source: SourceFolder, file: str, columns: Mapping[str, tuple[str]]
) -> Iterator[tuple[dict[str, Any], parquet.Place | None]]:
    """Yields (values by key, position of the row); stored images are left to `_make`."""
    places = parquet.rows(source, [file], columns, "row")
    if not places:
        return
    names = dict(places[0].columns)
    path = source.root / file
    try:
        with path.open("rb") as opened:
            table = pyarrow.parquet.ParquetFile(opened)
            stored = {key: name for key, name in names.items() if _stores_images(key, name, table)}
            light = {key: name for key, name in names.items() if key not in stored}
            at = iter(places)
            # Images are hashed: rows that share one stay in one split.
            size = _IMAGE_BATCH if stored else _BATCH
            for batch in table.iter_batches(size, columns=list(dict.fromkeys(names.values()))):
                for values in batch.to_pylist():
                    place = next(at)
                    kept = dataclasses.replace(place, columns=tuple(stored.items())) if stored else None
                    row = {key: values[name] for key, name in light.items()}
                    yield row | {"stored": [_digest_of(values[name]) for name in stored.values()]}, kept
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        paths.check_passing(path, error)
        raise UserError(f"{path}: is damaged ({' '.join(str(error).split())}); write it again") from error


def _digest_of(value: object) -> int | None:
    try:
        return digest(parquet.image_bytes(value))
    except SkipItem:
        return None  # reported when the row is converted


def _stores_images(key: str, name: str, table: pyarrow.parquet.ParquetFile) -> bool:
    kind = table.schema_arrow.field(name).type
    is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    return key.startswith("image ") and (is_bytes or pyarrow.types.is_struct(kind))


def _rows(
    values: Iterable[tuple[dict[str, Any], parquet.Place | None]], labels: Sequence[str], path: str
) -> tuple[list[_Row], list[str | None], list[collections.Counter[str]]]:
    """Returns (rows, the split stated by each, cell counts of each label column)."""
    rows: list[_Row] = []
    stated: list[str | None] = []
    counts: list[collections.Counter[str]] = [collections.Counter() for _ in labels]
    for number, (row, place) in enumerate(values, 1):
        problem = ""
        cells: list[str] = []
        for position, label in enumerate(labels):
            try:
                cells.append(sys.intern(cell_text(row[f"label {position}"], label)))
            except SkipItem as reason:
                cells.append("")
                problem = str(reason)
            else:
                if len(counts[position]) < _MAX_VALUES or cells[-1] in counts[position]:
                    counts[position][cells[-1]] += 1
        question = ""
        try:
            question = cell_text(row.get("question"), "question")
        except SkipItem as reason:
            problem = problem or str(reason)
        images = _images_of(row)
        own = row.get("id")
        name = _name(own) or (_name(images[0]) if images else "") or f"row-{number}"
        stated.append(user_data.split_named(row.get("split")))
        patient = _text(row.get("patient"))
        stored = tuple(found for found in row.get("stored", ()) if found is not None)
        experts = _text(row.get("expert"))
        rows.append(
            _Row(
                number,
                name,
                images,
                tuple(cells),
                question,
                patient,
                problem,
                place,
                stored=stored,
                experts=experts,
            )
        )
    if not rows:
        raise UserError(f"{path}: no rows; export it again")
    _make_ids_unique(rows)
    return rows, stated, counts


def _read_calls(rows: Sequence[_Row], given: argparse.Namespace, path: str) -> None:
    """Sets the calls of all rows; a wrong one is an error before anything is written."""
    cards = {card.name: card for card in load_cards(given.cards)}
    labels = () if given.one_hot else given.label
    known: dict[str, tuple[TableCall, ...] | str] = {}
    wrong: dict[str, list[int]] = {}
    for row in rows:
        if row.experts not in known:
            try:
                known[row.experts] = table_experts.parse_calls(row.experts, cards, labels)
            except ValueError as error:
                known[row.experts] = str(error)
        calls = known[row.experts]
        if isinstance(calls, str):
            wrong.setdefault(calls, []).append(row.number)
        else:
            row.calls = calls
    if wrong:
        found = [
            f"row {first}{f' and {len(others)} more' if others else ''}: {reason}"
            for reason, (first, *others) in wrong.items()
        ]
        raise UserError(
            f"{path}, column {given.expert}: {listed(found, 3)}; correct the table, or give --cards LIST"
        )


def _images_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the non-empty cells of the image columns; a cell may be a list of paths."""
    found: list[Any] = []
    for key, value in row.items():
        if key.startswith("image "):
            found += value if isinstance(value, list) else [value]
    return tuple(
        value.strip() if isinstance(value, str) else value
        for value in found
        if value is not None and (not isinstance(value, str) or value.strip())
    )


def _name(value: object) -> str:
    """Returns a cell as a printable id, or ""."""
    text = _text(value).replace("\\", "/")
    return text if text.isprintable() and len(text) <= _MAX_NAME else ""


def _text(value: object) -> str:
    try:
        return cell_text(value, "")
    except SkipItem:
        return ""


def _make_ids_unique(rows: Sequence[_Row]) -> None:
    """Appends a digest of labels and question to duplicate ids, and marks copies."""
    counts = collections.Counter(row.id for row in rows)
    taken: set[str] = set()
    for row in rows:
        if counts[row.id] > 1:
            own = (row.question, row.experts)
            content = (*row.labels, row.patient, *filter(None, own))
            suffix = digest("\0".join(content).encode("utf-8", "surrogatepass"))
            row.id = f"{row.id}#{suffix:016x}"
        if row.id in taken:
            row.problem = row.problem or "is a copy of an earlier row"
        taken.add(row.id)


def _group(rows: Sequence[_Row], *, with_patient: bool) -> None:
    owners, digests = [], []
    for position, row in enumerate(rows):
        shared = [user_data.image_node(image) for image in row.images if isinstance(image, str)]
        shared += [b"stored\0%d" % image for image in row.stored]
        if with_patient and row.patient:
            shared.append(b"patient\0" + row.patient.encode("utf-8", "surrogatepass"))
        owners += [position] * len(shared)
        digests += map(digest, shared)
    nodes = np.stack([np.array(owners, np.uint64), np.array(digests, np.uint64)], axis=1)
    lone = np.array([digest(row.id.encode("utf-8", "surrogatepass")) for row in rows], np.uint64)
    for row, group in zip(rows, user_data.groups_of(len(rows), nodes, lone).tolist(), strict=True):
        row.group = group


def _stated(rows: list[_Row], stated: list[str | None], column: str, path: str) -> dict[str, list[_Row]]:
    """Groups rows by stated split. Rows without one go to the first split, where they are skipped."""
    found = sorted({name for name in stated if name})
    if not found:
        raise UserError(f"{path}: no row has a split in column {column} ({STATED})")
    sides: dict[str, list[_Row]] = {name: [] for name in found}
    for row, name in zip(rows, stated, strict=True):
        if name is None:
            row.problem = row.problem or f"states no split in {column} ({STATED})"
        sides[name or found[0]].append(row)
    return sides


def _name_of(file: str, row: _Row) -> str:
    return f"{file} row {row.number}"


def _make(row: _Row, context: Context, *, settings: _Settings) -> Iterator[Example]:
    if row.problem:
        raise SkipItem(row.problem)
    if settings.with_patient:
        text_of(row.patient, "patient")
    if row.calls and row.place is None and not row.images:
        raise SkipItem(f"calls {row.calls[0].call.expert}, but names no image")
    images = _images(row, context, settings.root)
    rng = context.rng(row.id, "wording") if context.split == TRAIN else None
    if settings.one_hot:
        answers = [table_questions.one_hot_label(settings.labels, row.labels)]
    else:
        cells = zip(settings.columns, row.labels, strict=True)
        answers = [column.answer(cell) for column, cell in cells]
    exchanges, questions, asked = [], [], []
    for column, answer in zip(settings.columns, answers, strict=True):
        if answer is None:
            continue
        asked.append(column.header)
        if settings.question:
            text = text_of(row.question, settings.question)
            exchanges.append((text, answer))
            questions.append(free_question(text, answer))
            continue
        text = column.question(rng, len(images))
        exchanges.append((text, answer.capitalize() if column.kind == "yes_no" else answer))
        questions.append(question_meta(text, answer, column.header, options=column.options))
    if not exchanges:
        raise SkipItem("all labels are empty")
    meta = metadata(
        context,
        modality=settings.modality,
        patient=row.patient or None,
        group=None if settings.with_patient else f"{row.group:016x}",
        label_source="dataset",
    )
    requests = _requests(row.calls, questions, asked)
    example = conversation(row.id, images, exchanges, meta, questions=questions)
    yield dataclasses.replace(example, expert_requests=requests)


def _requests(
    calls: Sequence[TableCall], questions: Sequence[dict[str, Any]], asked: Sequence[str]
) -> tuple[ExpertRequest, ...]:
    """The requests of a row, whose questions are about the labels `asked`.

    Names the expert of each question in `questions`, for evaluation.
    """
    requests = []
    for made in calls:
        call = made.call
        if made.label and made.label not in asked:
            raise SkipItem(f"calls {call.expert} before {made.label}, whose cell is empty")
        position = asked.index(made.label) if made.label else 0
        if questions[position]["expert"] is None:
            questions[position].update(expert=call.expert, args=call.args)
        # A turn of the user and one of the assistant for each question.
        requests.append(ExpertRequest(call.expert, call.args, before_turn=2 * position + 1))
    return tuple(requests)


def _images(row: _Row, context: Context, root: str) -> list[ImageRef]:
    images: list[ImageRef] = []
    if row.place is not None:
        for value in parquet.read(root, row.place).values():
            images.append(stored_image(parquet.image_bytes(value), "of the table"))
    for path in row.images:
        if not isinstance(path, str):
            raise SkipItem(f"an image is a {type(path).__name__}, not a path")
        images.append(image_or_dicom(context, path))
    if not images:
        raise SkipItem("names no image")
    return images
