"""PathVQA: questions made from captions of pathology figures (He et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import pickle_reader, rows, vqa
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.rows import Row
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_COPY_COUNTS = {"train": 19654, "validation": 6259, "test": 6719}
_ORIGINAL_COUNTS = {"train": 19755, "validation": 6279, "test": 6761}
_ORIGINAL_NAMES = {"train": "train", "validation": "val", "test": "test"}
_LABEL_SOURCE = "caption"


class PathVqa(vqa.TrainOnValidation):
    """PathVQA, from the Hugging Face copy or the original release.

    The image comes before or after the question at random, as in the VILA-M3 paper, which trains on train and
    validation. Only the original has question ids and types. The copy lacks 167 duplicate questions and
    shares no key with the original, so comparison with published VILA-M3 results needs the original.
    `pickle_reader` parses its pickles without executing them.

    `parity` keeps whitespace. For the copy, it stores the file name in `meta.reference_id`, the reference's
    id, although questions share it. For the original, it takes the first answer of a question instead of the
    one with the highest score.
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
        "hf": "the Hugging Face copy, without duplicate questions",
        "original": "the authors' release, with question ids and types",
    }

    def published_splits(self, source: SourceFolder) -> dict[str, Split]:
        if self.config == "original":
            return _original_splits(source)
        return vqa.copied_splits(source, _COPY_COUNTS, modality="PATHOLOGY", label_source=_LABEL_SOURCE)


def _original_splits(source: SourceFolder) -> dict[str, Split]:
    base = "pvqa/" if source.find("pvqa/qas") else ""
    tables = [f"{base}qas/{name}_vqa.pkl" for name in _ORIGINAL_NAMES.values()]
    folders = [f"{base}images/{name}" for name in _ORIGINAL_NAMES.values()]
    source.require(*tables, *folders)
    splits, taken = {}, set()
    for split, table in zip(_ORIGINAL_NAMES, tables, strict=True):
        content = pickle_reader.read(source.root / table)
        if not isinstance(content, list):
            raise UserError(f"{source.root / table}: not a list of questions; download it again")
        listed = enumerate(content, 1)
        items = rows.rows_of(table, listed, lambda row: row["question_id"], prefix=split, taken=taken)
        splits[split] = Split(items, _make, rows.name_of, _ORIGINAL_COUNTS[split])
    return splits


def _make(row: Row, context: Context) -> Iterator[Example]:
    values = rows.fields(row)
    image = text_of(values.get("img_id"), "img_id").strip()
    if "/" in image or "\\" in image:
        raise SkipItem("the img_id is not a file name")
    folder = row.file.replace("qas/", "images/").removesuffix("_vqa.pkl")
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
    """Returns the answer with the highest score, the first of equals; with `parity` the first."""
    if not isinstance(label, dict) or not label:
        raise SkipItem("the label does not map answers to scores")
    if parity:
        return next(iter(label))
    if not all(isinstance(score, int | float) and score == score for score in label.values()):
        raise SkipItem("a score of the label is not a number")
    return max(label, key=label.__getitem__)
