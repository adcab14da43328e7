"""What question-answering sets about images share."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import parquet
from vilam3_jax.datasets.conversations import Marker, conversation, metadata, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, Split

YES_NO = ("yes", "no")
PARQUET_COLUMNS = {"image": ("image",), "question": ("question",), "answer": ("answer",)}


def value_of(row: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of `names` that the row has, compared without case; None without any."""
    for name in names:
        if name in row:
            return row[name]
    lower = {key.lower(): value for key, value in row.items() if isinstance(key, str)}
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)


def is_yes_no(answer: str) -> bool:
    """Whether an answer is yes or no, in any case and with a full stop or without."""
    return answer.strip().rstrip(".").lower() in YES_NO


def joined(train: Split, validation: Split) -> Split:
    """The items of both, as the training split of the paper."""
    counts = [split.expected for split in (train, validation) if split.expected is not None]
    expected = sum(counts) if len(counts) == 2 else None
    return dataclasses.replace(train, items=[*train.items, *validation.items], expected=expected)


def random_marker(rng: random.Random) -> Marker:
    """Images before or after the question, with even odds, as the paper has them."""
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
    """One question, its answer, and what evaluation needs of it.

    Args:
      name: the record's id.
      images: what the question is about.
      question, answer: of the source; spaces around them are removed unless `verbatim`.
      kind: the question's type.
      meta: of `conversations.metadata`.
      marker: where the images stand.
      label_source: whose word the answer is.
      verbatim: the texts stay as they are.

    Raises:
      SkipItem: question or answer is empty or no text.
    """
    asked, said = text_of(question, "question"), text_of(answer, "answer")
    if not verbatim:
        asked, said = asked.strip(), said.strip()
    closed = is_yes_no(said)
    right = said.strip().rstrip(".").lower() if closed else said
    evaluable = question_meta(asked, right, kind, options=YES_NO if closed else (), label_source=label_source)
    return conversation(name, images, [(asked, said)], meta, questions=[evaluable], marker=marker)


def copied_question(
    place: parquet.Place,
    context: Context,
    *,
    modality: str,
    label_source: str,
    marker: Marker | None = None,
) -> Iterator[Example]:
    """The example of a row (image, question, answer) of a Hugging Face copy, which has no ids.

    Rows of one image are a group.

    Args:
      place: the row.
      context: of the split.
      modality, label_source: of all rows.
      marker: where the image stands; None: before or after, at random.
    """
    values = parquet.read(context.root, place)
    data = parquet.image_bytes(values["image"])
    path = values["image"].get("path") if isinstance(values["image"], dict) else None
    answer = text_of(values["answer"], "answer")
    yield question_example(
        place.id,
        [ImageRef(data=data)],
        values["question"],
        answer,
        "closed" if is_yes_no(answer) else "open",
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
