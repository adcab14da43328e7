"""Examples of the usual kinds, with the metadata that evaluation, experts and leak reports need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, Turn
from vilam3_jax.datasets.dataset import Context, SkipItem

_MAX_TEXT = 1 << 20

Marker = str  # "before" or "after" the first question


def text_of(value: object, what: str) -> str:
    """A text of the source; numbers become their text.

    Raises:
      SkipItem: it is empty, too long, or no text.
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
        raise SkipItem(f"the {what} holds half of a surrogate pair, which is no text") from None
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
    """A question as evaluation reads it (`evals.protocol.items_of`).

    Args:
      question, answer: as the source has them; of a question with options, `answer` is one of them.
      kind: the question's type, such as "open", "closed", "presence".
      options: the answers that may be given; empty for free text.
      label_source: whose word the answer is: "dataset", "radiologist", "labeler", ...
      image: which image it is about.
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


def metadata(
    context: Context, *, modality: str, patient: object = None, group: object = None, **more: Any
) -> dict:
    """The metadata of a record.

    Args:
      context: of the split.
      modality: "CT", "MR", "CXR", ... as `data/experts` names them; "" for text.
      patient: the source's identifier; only its hash is kept. None: unknown.
      group: what must not be divided between splits where no patient is known, such as an image's name;
        hashed too.
      more: plain values that are kept as they are.
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
    system: str = "",
) -> Example:
    """A dialogue whose first question shows the images.

    Args:
      name: the record's id, unique in the dataset.
      images: in the order of their markers.
      exchanges: (question, answer) pairs. Markers in them are part of somebody's text and become "[image]".
      meta: of `metadata`.
      questions: of `question_meta`, kept as `meta["qa"]`.
      marker: where the images stand in the first question.
      system: text of a system turn; "" for none.

    Raises:
      SkipItem: there is no exchange.
    """
    if not exchanges:
        raise SkipItem("has no question with an answer")
    turns = [Turn("system", literal(system))] if system else []
    shown = "\n".join([IMAGE_MARKER] * len(images))
    for position, (question, answer) in enumerate(exchanges):
        words = literal(question)
        if position == 0 and images:
            words = f"{shown}\n{words}" if marker == "before" else f"{words}\n{shown}"
        turns += [Turn("user", words), Turn("assistant", literal(answer), True)]
    kept = {**meta, "qa": [dict(q) for q in questions]} if questions else dict(meta)
    return Example(name, "conversation", tuple(images), tuple(turns), meta=kept)


def pair(name: str, image: ImageRef, caption: str, meta: Mapping[str, Any], kind: str = "caption") -> Example:
    """An image with its caption: `kind` "caption" for generative, "pair" for contrastive training."""
    turns = (Turn("user", IMAGE_MARKER), Turn("assistant", literal(caption), True))
    return Example(name, kind, (image,), turns, meta=dict(meta))


def literal(text: str) -> str:
    """`text` with image markers that it quotes made harmless."""
    return text.replace(IMAGE_MARKER, "[image]")
