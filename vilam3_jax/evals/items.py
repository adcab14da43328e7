"""Items, the questions of a protocol: rules that make them of records, and a choice that is spread evenly."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.errors import UserError

if TYPE_CHECKING:
    from vilam3_jax.evals.protocol import Protocol

# Keys of `Example.meta` that group patients or images in tables.
GROUP_KEYS = ("modality", "sex", "age_band", "race", "view", "normal", "organ", "location", "source")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question about the images of one example.

    Attributes:
      id: `<example id>/q<position>`, unique in a dataset.
      example: id of the example.
      dataset: name of the dataset; '' if the record has none.
      images: the images that are shown, in order; empty for a question about text.
      input_keys: content keys of the decoded images or volumes, under which annotations are stored; empty if
        the data was prepared without.
      modality: in plain language, for prompts and tables.
      question: without image marker.
      answer: the right answer.
      question_type: for grouping.
      label_source: where the right answer is from.
      options: the possible answers; empty for an open question.
      expert: the expert that could answer it, or None.
      args: the arguments with which that expert is called.
      oracle: the expert returns the labels that the answer was made from.
      cluster: key of the patient, or of the group that patients were split by; questions of one cluster are
        not independent.
      answer_spec: what else a parser must know, such as `{"unit": "mm", "minimum": 0, "maximum": 200}`.
      region: [x0, y0, x1, y1] in fractions of the image's width and height: where the answer is seen; None if
        unknown.
      groups: values of `GROUP_KEYS` that the record has.
      reference_id: id in the reference's own files; '' if it has none.
    """

    id: str
    example: str
    dataset: str
    images: tuple[ImageRef, ...]
    input_keys: tuple[str, ...]
    modality: str
    question: str
    answer: str
    question_type: str
    label_source: str
    options: tuple[str, ...]
    expert: str | None
    args: str
    oracle: bool
    cluster: str
    answer_spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    region: tuple[float, float, float, float] | None = None
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reference_id: str = ""


ItemRule = Callable[[Iterable[Example], "Protocol"], Iterable[Item]]


def qa_of_dialogues(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """Every question of every dialogue, each about its own image."""
    return _questions(examples, protocol, whole_study=False)


def qa_of_studies(examples: Iterable[Example], protocol: Protocol) -> Iterable[Item]:
    """Every question of every dialogue, each about all images of its record."""
    return _questions(examples, protocol, whole_study=True)


ITEM_RULES: dict[str, ItemRule] = {"qa_of_dialogues": qa_of_dialogues, "qa_of_studies": qa_of_studies}


def items_of(examples: Iterable[Example], protocol: Protocol) -> list[Item]:
    """The items of `protocol`, in the order of the examples.

    Reads `meta["qa"]`: a list of {question, answer, type, label_source, options, expert, args, oracle} and
    optionally `image` (by default 0), `answer_spec` and `region`; and `meta["input_key"]`,
    `meta["modality"]`, and `meta["group"]` or else `meta["patient"]` or else the example itself as cluster.

    Raises:
      UserError: an example of the protocol's split lacks a key, two items have one id, or there is no item.
    """
    if protocol.items not in ITEM_RULES:
        raise UserError(f"protocol {protocol.name}: item rule {protocol.items!r} unknown")
    items: dict[str, Item] = {}
    for item in ITEM_RULES[protocol.items](examples, protocol):
        if protocol.question_types and item.question_type not in protocol.question_types:
            continue
        if items.setdefault(item.id, item) is not item:
            raise UserError(f"item {item.id!r} is twice in the data; remove the duplicate example")
    if not items:
        wanted = f" of {', '.join(protocol.datasets)}" if protocol.datasets else ""
        raise UserError(
            f"protocol {protocol.name}: no question{wanted} in split {protocol.split!r}; check --data"
        )
    return list(items.values())


def _questions(examples: Iterable[Example], protocol: Protocol, *, whole_study: bool) -> Iterable[Item]:
    for example in examples:
        if example.meta.get("split") != protocol.split:
            continue
        if protocol.datasets and example.meta.get("dataset") not in protocol.datasets:
            continue
        for position, qa in enumerate(example.meta.get("qa") or ()):
            try:
                yield _item(example, position, qa, whole_study)
            except (KeyError, IndexError, TypeError) as error:
                raise UserError(
                    f"example {example.id!r}, question {position}: {error!r} in its meta; "
                    "prepare the dataset again"
                ) from error


def _item(example: Example, position: int, qa: dict[str, Any], whole_study: bool) -> Item:
    meta = example.meta
    found = meta.get("input_key") or ()
    keys = (found,) if isinstance(found, str) else tuple(found)
    images = example.images
    if images and not whole_study:
        shown = qa.get("image", 0)
        images, keys = (images[shown],), keys[shown : shown + 1] if len(keys) > 1 else keys
    region = qa.get("region")
    return Item(
        id=f"{example.id}/q{position}",
        example=example.id,
        dataset=str(meta.get("dataset") or ""),
        images=images,
        input_keys=keys,
        modality=str(meta["modality"]),
        question=str(qa["question"]),
        answer=str(qa["answer"]),
        question_type=str(qa["type"]),
        label_source=str(qa["label_source"]),
        options=tuple(str(option) for option in qa.get("options") or ()),
        expert=qa["expert"],
        args=str(qa.get("args") or ""),
        oracle=bool(qa["oracle"]),
        cluster=str(meta.get("group") or meta.get("patient") or example.id),
        answer_spec=dict(qa.get("answer_spec") or {}),
        region=None if region is None else tuple(float(edge) for edge in region),  # pyright: ignore
        groups={key: str(meta[key]) for key in GROUP_KEYS if meta.get(key) not in (None, "")},
        reference_id=str(qa.get("reference_id") or meta.get("reference_id") or ""),
    )


def limit_items(items: Sequence[Item], per_type: int | None, per_other_type: int | None = None) -> list[Item]:
    """Keeps at most `per_type` items of each question type, spread evenly over clusters; None keeps all.

    With `per_other_type`, `per_type` holds only for items that an expert can answer and did not label; the
    others of a type are counted separately.

    Within a type, clusters take turns; within a cluster, items are ordered by the sha256 of their id. The
    choice depends on the items alone, so every condition asks the same questions. Order is kept.
    """
    if per_type is None and per_other_type is None:
        return list(items)
    for limit in (per_type, per_other_type):
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit}: must be at least 1 question per type")

    def key(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    groups: dict[tuple[str, bool, str], list[str]] = defaultdict(list)
    for item in items:
        other = per_other_type is not None and (item.expert is None or item.oracle)
        groups[item.question_type, other, item.cluster].append(item.id)
    turns: dict[tuple[str, bool], list[tuple[int, str, str]]] = defaultdict(list)
    for (kind, other, cluster), ids in groups.items():
        turns[kind, other] += [(turn, key(cluster), name) for turn, name in enumerate(sorted(ids, key=key))]
    kept = {
        name
        for (_, other), of_type in turns.items()
        for _, _, name in sorted(of_type)[: per_other_type if other else per_type]
    }
    return [item for item in items if item.id in kept]


def item_set_hash(items: Iterable[Item]) -> str:
    """sha256 (hex) of the items without pixels: equal sets of questions have equal hashes."""
    digest = hashlib.sha256()
    for item in sorted(items, key=lambda item: item.id):
        fields = (item.id, *item.input_keys, item.question, item.answer, item.question_type, *item.options)
        digest.update("\x1f".join(fields).encode() + b"\x1e")
    return digest.hexdigest()
