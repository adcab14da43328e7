"""Shared code of the visual question-answering datasets."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import parquet
from vilam3_jax.datasets.conversations import Marker, conversation, free_question, metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, Split
from vilam3_jax.datasets.source_files import SourceFolder

_COLUMNS = {"image": ("image",), "question": ("question",), "answer": ("answer",)}


class TrainOnValidation(Dataset):
    """Adds `--train-on-validation`, which merges the validation split into train as VILA-M3 does."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--train-on-validation", action="store_true", help="add the validation questions to train"
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        splits = self.published_splits(source)
        if self.options.train_on_validation:
            train, validation = splits["train"], splits.pop("validation")
            items, counts = [*train.items, *validation.items], (train.expected, validation.expected)
            expected = None if None in counts else sum(filter(None, counts))
            splits["train"] = dataclasses.replace(train, items=items, expected=expected)
        return splits

    def published_splits(self, source: SourceFolder) -> dict[str, Split]:
        """Returns the splits of the source; see `Dataset.splits`."""
        raise NotImplementedError


def random_marker(rng: random.Random) -> Marker:
    """Puts images before or after the question with even odds, as in the VILA-M3 paper."""
    return "before" if rng.random() < 0.5 else "after"


def question_example(
    name: str,
    images: Sequence[ImageRef],
    question: object,
    answer: object,
    kind: str,
    meta: Mapping[str, Any],
    *,
    marker: Marker,
    label_source: str,
    verbatim: bool = False,
) -> Example:
    """Returns a conversation of one question and its answer.

    Args:
      name, images, meta, marker: see `conversation`.
      question, answer: of the source; surrounding whitespace is removed unless `verbatim`.
      kind, label_source: see `free_question`.
      verbatim: keep whitespace.

    Raises:
      SkipItem: question or answer is not text or empty.
    """
    question, answer = text_of(question, "question"), text_of(answer, "answer")
    if not verbatim:
        question, answer = question.strip(), answer.strip()
    qa = free_question(question, answer, kind, label_source=label_source)
    return conversation(name, images, [(question, answer)], meta, questions=[qa], marker=marker)


def copied_splits(
    source: SourceFolder,
    counts: Mapping[str, int],
    *,
    modality: str,
    label_source: str,
    marker: Marker | None = None,
) -> dict[str, Split]:
    """Returns the splits of a Hugging Face copy, with rows (image, question, answer) and no ids.

    Rows with equal images form a group.

    Args:
      source: the source folder.
      counts: split → expected number of rows.
      modality, label_source: of all rows.
      marker: position of the image; None for a random one.
    """
    make = functools.partial(_copied, modality=modality, label_source=label_source, marker=marker)
    files = {name: parquet.parts(source, f"data/{name}-*.parquet", f"{name}-*.parquet") for name in counts}
    return {
        name: Split(parquet.rows(source, parts, _COLUMNS, name), make, expected=counts[name])
        for name, parts in files.items()
    }


def _copied(
    place: parquet.Place, context: Context, *, modality: str, label_source: str, marker: Marker | None
) -> Iterator[Example]:
    values = parquet.read(context.root, place)
    data = parquet.image_bytes(values["image"])
    path = values["image"].get("path") if isinstance(values["image"], dict) else None
    yield question_example(
        place.id,
        [ImageRef(data=data)],
        values["question"],
        values["answer"],
        "",
        metadata(
            context,
            modality=modality,
            group=hashlib.sha256(data).hexdigest(),
            label_source=label_source,
            reference_id=path if context.parity and isinstance(path, str) else None,
        ),
        marker=marker or random_marker(context.rng(place.id)),
        label_source=label_source,
        verbatim=context.parity,
    )
