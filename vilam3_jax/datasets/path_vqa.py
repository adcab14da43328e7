"""PathVQA: questions made from captions of pathology figures (He et al., 2020)."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import parquet, pickle_reader, rows, vqa
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.rows import Row
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_COPY_COUNTS = {"train": 19654, "validation": 6259, "test": 6719}
_ORIGINAL_COUNTS = {"train": 19755, "validation": 6279, "test": 6761}
_ORIGINAL_NAMES = {"train": "train", "validation": "val", "test": "test"}
_LABEL_SOURCE = "caption"


class PathVqa(Dataset):
    """PathVQA, from the Hugging Face copy or the original release.

    The image stands before or after the question at random, as in the paper of VILA-M3, which trains on train
    and validation. Only the original release has question ids and question types; the copy lacks 167 doubled
    questions and has no key that joins it to the original, so published VILA-M3 results need the original.
    Its pickles are read by `pickle_reader`, which runs nothing.

    `parity` keeps the spaces of texts. In the copy, `meta.reference_id` holds the file's name, which the
    reference has for an id though questions share it. In the original, it takes the first answer of a
    question; otherwise the one of the highest score is taken.
    """

    has_parity = True
    name = "path_vqa"
    description = "Questions about pathology figures of textbooks and the PEIR library."
    homepage = "https://github.com/UCSD-AI4H/PathVQA"
    citation = "He et al. PathVQA: 30000+ questions for medical visual question answering. 2020."
    licence = "MIT"
    instructions = (
        "hf: from https://huggingface.co/datasets/flaviagiammarino/path-vqa, the folder `data` with 13 "
        "parquet files (7 train, 3 validation, 3 test). "
        "original: from https://github.com/UCSD-AI4H/PathVQA, the archive `pvqa` with "
        "`qas/{train,val,test}_vqa.pkl` and `images/{train,val,test}/*.jpg`."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "hf": "the Hugging Face copy, without doubled questions",
        "original": "the release of the authors, with question ids and types",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--train-on-validation", action="store_true", help="add the validation questions to train"
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        splits = _original_splits(source) if self.config == "original" else _copied_splits(source)
        if self.options.train_on_validation:
            splits["train"] = vqa.joined(splits["train"], splits.pop("validation"))
        return splits


def _copied_splits(source: SourceFolder) -> dict[str, Split]:
    files = {
        split: parquet.parts(source, f"data/{split}-*.parquet", f"{split}-*.parquet")
        for split in _COPY_COUNTS
    }
    return {
        split: Split(
            parquet.rows(source, names, vqa.PARQUET_COLUMNS, split),
            functools.partial(vqa.copied_question, modality="PATHOLOGY", label_source=_LABEL_SOURCE),
            expected=_COPY_COUNTS[split],
        )
        for split, names in files.items()
    }


def _original_splits(source: SourceFolder) -> dict[str, Split]:
    base = "pvqa/" if source.find("pvqa/qas") else ""
    tables = [f"{base}qas/{name}_vqa.pkl" for name in _ORIGINAL_NAMES.values()]
    folders = [f"{base}images/{name}" for name in _ORIGINAL_NAMES.values()]
    source.require(*tables, *folders)
    splits, taken = {}, set()
    for split, table, folder in zip(_ORIGINAL_NAMES, tables, folders, strict=True):
        content = pickle_reader.read(source.root / table)
        if not isinstance(content, list):
            raise UserError(f"{source.root / table}: holds no list of questions; download it again")
        listed = rows.rows_of(table, enumerate(content, 1), _question_id, prefix=split, taken=taken)
        items = [_Question(row, folder) for row in listed]
        splits[split] = Split(items, _make, _name_of, _ORIGINAL_COUNTS[split])
    return splits


class _Question(NamedTuple):
    """A row and the folder of its image."""

    row: Row
    folder: str


def _name_of(item: _Question) -> str:
    return rows.name_of(item.row)


def _question_id(values: Any) -> object:
    return values["question_id"]


def _make(item: _Question, context: Context) -> Iterator[Example]:
    row, folder = item
    values = rows.fields(row)
    image = text_of(values.get("img_id"), "img_id").strip()
    if "/" in image or "\\" in image:
        raise SkipItem("the img_id is no file name")
    answer_type = text_of(values.get("answer_type"), "answer type").strip().lower()
    question_type = values.get("question_type")
    types = None if question_type is None else [text_of(question_type, "question type").strip()]
    yield vqa.question_example(
        row.id,
        [context.image(f"{folder}/{image}.jpg")],
        values.get("sent"),
        _answer(values.get("label"), context.parity),
        "closed" if answer_type == "yes/no" else "open",
        metadata(
            context,
            modality="PATHOLOGY",
            group=image,
            question_types=types,
            answer_type=answer_type,
            label_source=_LABEL_SOURCE,
        ),
        marker=vqa.random_marker(context.rng(row.id)),
        label_source=_LABEL_SOURCE,
        verbatim=context.parity,
    )


def _answer(label: object, parity: bool) -> object:
    """The answer among {answer: score}: the best, the first of equals."""
    if not isinstance(label, dict) or not label:
        raise SkipItem("the label is no object of answers and scores")
    if parity:
        return next(iter(label))
    if not all(isinstance(score, int | float) and score == score for score in label.values()):
        raise SkipItem("a score of the label is no number")
    return max(label, key=lambda answer: label[answer])
