"""A table of one's own: images, labels of any kind, and the questions that they answer."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import parquet
from vilam3_jax.datasets.conversations import conversation, metadata, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.own_splits import STATED, TRAIN, groups_of, held_out, split_named
from vilam3_jax.datasets.pictures import picture_or_dicom, stored_picture
from vilam3_jax.datasets.record_files import digest
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.table_questions import (
    ONE_HOT,
    Asked,
    asked_of,
    cell_text,
    marked,
    one_hot,
    read_templates,
)
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_TEMPLATES = 16 << 20  # bytes
_MOST_KINDS = 100_000  # different cells of a column that are counted to find its kind
_HEADER_BYTES = 1 << 20
_BATCH = 8_192
_IMAGE_BATCH = 64
_LONGEST_NAME = 512


@dataclasses.dataclass(slots=True)
class _Row:
    """A row of the table.

    Attributes:
      number: from 1; the header is not counted.
      id: of its example.
      images: what its image columns hold; empty where the table holds the images themselves.
      labels: a text for each label column, "" for an empty cell.
      patient: as the table states it, "" for unknown.
      problem: why it cannot be used, "" for no reason.
      place: in a parquet file, where images are in the table.
      group: of rows that share an image or a patient.
      stored: digests of the images that the table holds.
    """

    number: int
    id: str
    images: tuple[Any, ...]
    labels: tuple[str, ...]
    patient: str = ""
    problem: str = ""
    place: parquet.Place | None = None
    group: int = 0
    stored: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is done with the rows.

    Attributes:
      file: name of the table.
      root: its folder.
      asked: how each label column is asked about; one entry for one-hot labels.
      labels: the label columns.
      modality: of all images.
      with_patient: rows state their patient.
      one_hot: the labels are one class.
    """

    file: str
    root: str
    asked: tuple[Asked, ...]
    labels: tuple[str, ...]
    modality: str
    with_patient: bool
    one_hot: bool


class Table(Dataset):
    """Questions about images, made of a table's labels: 0/1, one-hot, numbers, classes or texts.

    Each label column of a row that is filled gives a question with its answer. The kind of a column follows
    from its cells or from the file of questions (`--questions`):
      - yes_no: cells are 0/1, yes/no, true/false, positive/negative or present/absent;
      - choice: up to 20 different short texts or whole numbers, which the question lists; more than five of
        them must occur twice on average;
      - number: other numbers;
      - text: all else.
    Training rows vary the wording; other splits use the first one.

    Rows that share an image or, with `--patient`, a patient stay in one split. The side depends on a hash of
    what is shared, so a row stays where it is when rows are added that it shares nothing with.
    """

    name = "table"
    description = "Questions about images of one's own, from the labels of a CSV or parquet file."
    licence = "unverified"
    access = "credentialed"
    instructions = (
        "--source is a .csv, .tsv or .parquet file with a header; --image names its column of paths below "
        "--images, and --label its columns of labels."
    )
    source_is_file: ClassVar[bool] = True

    def __init__(self, options: argparse.Namespace | None = None, config: str = "") -> None:
        """Checks that the options go together.

        Raises:
          UserError: they do not.
        """
        super().__init__(options, config)
        given = self.options
        if not 0 <= given.heldout < 1:
            raise UserError(f"--heldout {given.heldout}: give a share from 0 up to, but not, 1")
        if given.split_by == "patient" and not given.patient:
            raise UserError("--split-by patient needs --patient COLUMN, the column that names the patient")
        if given.one_hot and len(given.label) < 2:
            raise UserError("--one-hot needs two --label columns or more")
        names = [name.strip().casefold() for name in given.label]
        if len(set(names)) != len(names):
            raise UserError(f"--label {' '.join(given.label)}: a column is named twice")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares the columns, the questions, and how rows are split."""
        parser.add_argument(
            "--image", nargs="+", default=[], metavar="COLUMN", help="columns of image paths, or of images"
        )
        parser.add_argument("--label", nargs="+", default=[], metavar="COLUMN", help="columns of labels")
        parser.add_argument(
            "--one-hot", action="store_true", help="the label columns are one class: a row marks one of them"
        )
        parser.add_argument(
            "--questions", metavar="FILE.json", help="how columns are asked about; see docs/datasets_chest.md"
        )
        parser.add_argument("--id", metavar="COLUMN", help="column of record ids; default: the image's path")
        parser.add_argument(
            "--images", metavar="DIR", help="folder below which images lie; default: that of --source"
        )
        parser.add_argument("--patient", metavar="COLUMN", help="column that names the patient")
        parser.add_argument(
            "--split-by",
            choices=("patient", "hash"),
            default="hash",
            help="what stays together: rows of a patient (needs --patient), or those that share an image",
        )
        parser.add_argument(
            "--heldout", type=float, default=0.1, metavar="SHARE", help="share that is held out"
        )
        parser.add_argument(
            "--split", metavar="COLUMN", help="column that states the split; --heldout is not used"
        )
        parser.add_argument(
            "--modality", default="", help="CT, MR, CXR, ... of all images, for experts and tables"
        )
        parser.add_argument("--licence", default="", help="SPDX id or name of the terms of these data")

    def context(self, source: SourceFolder, split: str, **settings: Any) -> Context:
        """As of any dataset, but the root is the folder of the images."""
        given = super().context(source, split, **settings)
        root = str(paths.as_path(self.options.images)) if self.options.images else given.root
        return dataclasses.replace(given, root=root, licence=self.options.licence or given.licence)

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Reads the table once; images that it holds stay where they are."""
        given = self.options
        file = self._checked_source(source)
        path = str(source.root / file)
        templates = _templates(given.questions, given.label)
        values = _read_parquet if _is_parquet(file) else _read_text
        rows, stated, counts = _rows(values(source, file, self._columns()), given.label, path)
        if given.one_hot:
            asked = [one_hot(given.label, templates.get(ONE_HOT, {}))]
        else:
            cells = zip(given.label, counts, strict=True)
            asked = [asked_of(label, found, templates.get(label, {})) for label, found in cells]
        plan = _Plan(
            file,
            str(source.root),
            tuple(asked),
            tuple(given.label),
            given.modality,
            with_patient=bool(given.patient),
            one_hot=given.one_hot,
        )
        make = functools.partial(_make, plan=plan)
        name_of = functools.partial(_name_of, file)
        _group(rows, with_patient=bool(given.patient))
        sides = _stated(rows, stated, given.split, path) if given.split else _sides(rows, given.heldout, path)
        return {side: Split(found, make, name_of) for side, found in sides.items() if found}

    def _checked_source(self, source: SourceFolder) -> str:
        file = getattr(self.options, "source_file", None)
        if not file:
            raise UserError(f"{source.root}: give the table itself as --source. {self.instructions}")
        if not self.options.image or not self.options.label:
            raise UserError(
                f"{source.root / file}: give --image COLUMN and --label COLUMN. {self.instructions}"
            )
        images = self.options.images
        if images and not paths.as_path(images).is_dir():
            raise UserError(f"--images {images}: no such folder; give the folder below which images lie")
        return file

    def _columns(self) -> dict[str, tuple[str]]:
        """Key of a row → the header that it is read from."""
        given = self.options
        columns = {f"image {number}": (name,) for number, name in enumerate(given.image)}
        columns |= {f"label {number}": (name,) for number, name in enumerate(given.label)}
        single = {"patient": given.patient, "split": given.split, "id": given.id}
        return columns | {key: (name,) for key, name in single.items() if name}


def _is_parquet(file: str) -> bool:
    return file.lower().endswith((".parquet", ".pq"))


def _templates(path: str | None, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    try:
        content = json.loads(paths.read_bytes(paths.as_path(path), _MAX_TEMPLATES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({' '.join(str(error).split())})") from error
    return read_templates(content, labels, path)


def _read_text(
    source: SourceFolder, file: str, columns: Mapping[str, tuple[str]]
) -> Iterator[tuple[dict[str, Any], None]]:
    for row in source.table(file, columns, delimiter=_delimiter(source, file)):
        yield row, None


def _delimiter(source: SourceFolder, file: str) -> str:
    """The delimiter of the header: a tab or a semicolon only where it has no comma."""
    if file.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    with (source.root / file).open("rb") as opened:
        header = opened.read(_HEADER_BYTES).partition(b"\n")[0]
    return next((mark for mark in (",", "\t", ";") if mark.encode() in header), ",")


def _read_parquet(
    source: SourceFolder, file: str, columns: Mapping[str, tuple[str]]
) -> Iterator[tuple[dict[str, Any], parquet.Place | None]]:
    """(values by key, where the row stands); columns that hold images are left to `_make`."""
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
            # Images are read too, as rows that share one stay in one split.
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
        return None  # said when the row's turn comes


def _stores_images(key: str, name: str, table: pyarrow.parquet.ParquetFile) -> bool:
    kind = table.schema_arrow.field(name).type
    is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    return key.startswith("image ") and (is_bytes or pyarrow.types.is_struct(kind))


def _rows(
    values: Iterable[tuple[dict[str, Any], parquet.Place | None]], labels: Sequence[str], path: str
) -> tuple[list[_Row], list[str | None], list[collections.Counter[str]]]:
    """(rows, the split that each states, cells of each label column)."""
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
                if len(counts[position]) < _MOST_KINDS or cells[-1] in counts[position]:
                    counts[position][cells[-1]] += 1
        images = _images_of(row)
        own = row.get("id")
        name = _name(own) or (_name(images[0]) if images else "") or f"row-{number}"
        stated.append(split_named(row.get("split")))
        patient = _text(row.get("patient"))
        stored = tuple(found for found in row.get("stored", ()) if found is not None)
        rows.append(_Row(number, name, images, tuple(cells), patient, problem, place, stored=stored))
    if not rows:
        raise UserError(f"{path}: holds no row; write it again")
    _name_uniquely(rows)
    return rows, stated, counts


def _images_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Cells of the image columns; a cell may be a list of paths. Empty cells count for no image."""
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
    """A printable id of a cell, "" for none."""
    text = _text(value).replace("\\", "/")
    return text if text.isprintable() and len(text) <= _LONGEST_NAME else ""


def _text(value: object) -> str:
    """A name of something: a text, or a whole number; "" for all else."""
    try:
        return cell_text(value, "")
    except SkipItem:
        return ""


def _name_uniquely(rows: Sequence[_Row]) -> None:
    """Gives rows that share an id a digest of their labels, and marks copies."""
    often = collections.Counter(row.id for row in rows)
    taken: set[str] = set()
    for row in rows:
        if often[row.id] > 1:
            told = digest("\0".join((*row.labels, row.patient)).encode("utf-8", "surrogatepass"))
            row.id = f"{row.id}#{told:016x}"
        if row.id in taken:
            row.problem = row.problem or "is a copy of an earlier row"
        taken.add(row.id)


def _group(rows: Sequence[_Row], *, with_patient: bool) -> None:
    """Sets the group of each row."""
    owners, digests = [], []
    for position, row in enumerate(rows):
        shared = [b"image\0" + _path_key(image) for image in row.images if isinstance(image, str)]
        shared += [b"stored\0%d" % image for image in row.stored]
        if with_patient and row.patient:
            shared.append(b"patient\0" + row.patient.encode("utf-8", "surrogatepass"))
        owners += [position] * len(shared)
        digests += map(digest, shared)
    nodes = np.stack([np.array(owners, np.uint64), np.array(digests, np.uint64)], axis=1)
    lone = np.array([digest(row.id.encode("utf-8", "surrogatepass")) for row in rows], np.uint64)
    for row, group in zip(rows, groups_of(len(rows), nodes, lone).tolist(), strict=True):
        row.group = group


def _path_key(path: str) -> bytes:
    return os.path.normpath(path.replace("\\", "/")).encode("utf-8", "surrogatepass")


def _sides(rows: list[_Row], share: float, path: str) -> dict[str, list[_Row]]:
    masks = held_out(np.array([row.group for row in rows], np.uint64), share, path)
    return {
        side: [row for row, chosen in zip(rows, mask, strict=True) if chosen] for side, mask in masks.items()
    }


def _stated(rows: list[_Row], stated: list[str | None], column: str, path: str) -> dict[str, list[_Row]]:
    """Rows by the split that they state; those that state none go to the first, to be skipped by name."""
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


def _make(row: _Row, context: Context, *, plan: _Plan) -> Iterator[Example]:
    if row.problem:
        raise SkipItem(row.problem)
    if plan.with_patient:
        text_of(row.patient, "patient")
    images = _pictures(row, context, plan.root)
    rng = context.rng(row.id, "wording") if context.split == TRAIN else None
    exchanges, questions = [], []
    for asked, answer in _answers(row, plan):
        text = asked.question(rng, len(images))
        exchanges.append((text, answer.capitalize() if asked.kind == "yes_no" else answer))
        questions.append(question_meta(text, answer, asked.column, options=asked.options))
    if not exchanges:
        raise SkipItem("no label is filled")
    meta = metadata(
        context,
        modality=plan.modality,
        patient=row.patient or None,
        group=None if plan.with_patient else f"{row.group:016x}",
        label_source="dataset",
    )
    yield conversation(row.id, images, exchanges, meta, questions=questions)


def _answers(row: _Row, plan: _Plan) -> Iterator[tuple[Asked, str]]:
    if plan.one_hot:
        answer = marked(plan.labels, row.labels)
        if answer is not None:
            yield plan.asked[0], answer
        return
    for asked, cell in zip(plan.asked, row.labels, strict=True):
        answer = asked.answer(cell)
        if answer is not None:
            yield asked, answer


def _pictures(row: _Row, context: Context, root: str) -> list[ImageRef]:
    images: list[ImageRef] = []
    if row.place is not None:
        for value in parquet.read(root, row.place).values():
            images.append(stored_picture(parquet.image_bytes(value), "of the table"))
    for path in row.images:
        if not isinstance(path, str):
            raise SkipItem(f"an image is a {type(path).__name__}, not a path")
        images.append(picture_or_dicom(context, path))
    if not images:
        raise SkipItem("names no image")
    return images
