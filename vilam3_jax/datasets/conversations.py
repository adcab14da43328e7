"""Builders for conversations and captioned images, with metadata for evaluation and leak reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, Turn
from vilam3_jax.datasets.dataset import Context, SkipItem

_MAX_TEXT = 1 << 20

YES_NO = ("yes", "no")
Marker = str  # position of the images: "before" or "after" the first question


def text_of(value: object, what: str) -> str:
    """Returns a text field of the source; numbers are converted.

    Raises:
      SkipItem: the value is empty, too long, or neither text nor number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise SkipItem(
            f"the {what} is {'missing' if value is None else f'a {type(value).__name__}, not a text'}"
        )
    text = str(value).replace("\0", "")
    if not text.strip():
        raise SkipItem(f"the {what} is empty")
    if len(text) > _MAX_TEXT:
        raise SkipItem(f"the {what} has {len(text)} characters; up to {_MAX_TEXT} are read")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SkipItem(f"the {what} contains an unpaired surrogate") from None
    return text


def question_meta(
    question: str,
    answer: str,
    kind: str,
    *,
    options: Sequence[str] = (),
    label_source: str = "dataset",
    image: int = 0,
) -> dict[str, Any]:
    """Returns an entry of `meta["qa"]`, which evaluation reads (`evals.protocol.items_of`).

    Args:
      question, answer: source text; with options, `answer` is one of them.
      kind: question type, such as "open", "closed" or "presence".
      options: allowed answers; empty for free text.
      label_source: origin of the answer: "dataset", "radiologist", "labeler", ...
      image: index of the image in question.
    """
    return {
        "question": question,
        "answer": answer,
        "type": kind,
        "label_source": label_source,
        "options": list(options),
        "expert": None,
        "args": "",
        "oracle": False,
        "image": image,
    }


def free_question(question: str, answer: str, kind: str = "", **more: Any) -> dict[str, Any]:
    """`question_meta` for an answer without listed options; "Yes." and "no" get the options `YES_NO`.

    Args:
      question, answer: source text.
      kind: question type; "" for "closed" (yes or no) or "open".
      more: further arguments of `question_meta`.
    """
    word = answer.strip().rstrip(".").lower()
    if word in YES_NO:
        return question_meta(question, word, kind or "closed", options=YES_NO, **more)
    return question_meta(question, answer, kind or "open", **more)


def metadata(
    context: Context, *, modality: str, patient: object = None, group: object = None, **more: Any
) -> dict:
    """Returns the metadata of a record.

    Args:
      context: context of the split.
      modality: "CT", "MR", "CXR", ... as in `data/experts`; "" for text.
      patient: identifier in the source; only its hash is kept. None if unknown.
      group: what must stay in one split if the patient is unknown, such as an image name; hashed too.
      more: plain values; None is dropped.
    """
    meta = {
        "dataset": context.dataset,
        "split": context.split,
        "modality": modality,
        "licence": context.licence,
    }
    if patient is not None:
        meta["patient"] = context.patient(patient)
    if group is not None:
        meta["group"] = context.patient(group)
    return meta | {key: value for key, value in more.items() if value is not None}


def conversation(
    name: str,
    images: Sequence[ImageRef],
    exchanges: Sequence[tuple[str, str]],
    meta: Mapping[str, Any],
    *,
    questions: Sequence[Mapping[str, Any]] = (),
    marker: Marker = "before",
) -> Example:
    """Returns a conversation with all images in the first question.

    Args:
      name: record id, unique in the dataset.
      images: in the order of their markers.
      exchanges: (question, answer) pairs; image markers quoted in them become "[image]".
      meta: of `metadata`.
      questions: of `question_meta`, stored as `meta["qa"]`.
      marker: position of the images.

    Raises:
      SkipItem: `exchanges` is empty.
    """
    if not exchanges:
        raise SkipItem("has no question with an answer")
    turns = []
    shown = "\n".join([IMAGE_MARKER] * len(images))
    for position, (question, answer) in enumerate(exchanges):
        words = literal(question)
        if position == 0 and images:
            words = f"{shown}\n{words}" if marker == "before" else f"{words}\n{shown}"
        turns += [Turn("user", words), Turn("assistant", literal(answer), True)]
    kept = {**meta, "qa": [dict(q) for q in questions]} if questions else dict(meta)
    return Example(name, "conversation", tuple(images), tuple(turns), meta=kept)


def question_conversation(
    name: str, images: Sequence[ImageRef], meta: Mapping[str, Any], questions: Sequence[Mapping[str, Any]]
) -> Example:
    """Returns a conversation whose exchanges are exactly the entries of `meta["qa"]`."""
    exchanges = [(q["question"], q["answer"]) for q in questions]
    return conversation(name, images, exchanges, meta, questions=questions)


def pair(name: str, image: ImageRef, caption: str, meta: Mapping[str, Any], kind: str = "caption") -> Example:
    """Returns a captioned image: `kind` is "caption" for generative, "pair" for contrastive training."""
    turns = (Turn("user", IMAGE_MARKER), Turn("assistant", literal(caption), True))
    return Example(name, kind, (image,), turns, meta=dict(meta))


def literal(text: str) -> str:
    """Escapes image markers quoted in `text`."""
    return text.replace(IMAGE_MARKER, "[image]")
