"""Instruction lists in the formats of VILA and LLaVA.

Supported are `conversations` of `from`/`value`, `messages` of `role`/`content` (text or parts), and
`question`/`answer` with base64 images, as in VILA's "vflan" lists.
"""

from __future__ import annotations

import array
import base64
import binascii
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, from_instruction
from vilam3_jax.datasets import record_files
from vilam3_jax.datasets.conversations import free_question, text_of
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.image_files import stored_image
from vilam3_jax.datasets.record_files import Place
from vilam3_jax.errors import UserError

DIALOGUE_KEYS = ("conversations", "conversatons", "conversation", "messages")
_IMAGE_KEYS = ("images", "image")
_MAX_ID = 512
_MAX_IMAGES = 256
_MAX_PATH = 1024
# Base64 prefixes of JPEG, PNG, WebP and GIF.
_BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")
_EXTENSIONS = ("vilam3",)  # this project's key, ignored by VILA's loader
_ANY = "record"  # placeholder id while a record is parsed

UNIQUE, SHARED_ID, COPY = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Record:
    """A record of a list."""

    place: Place
    identity: int = UNIQUE  # or `SHARED_ID` (a different record has its id), `COPY` (of an earlier record)
    group: int = 0  # shared by records with a common image or patient


class RecordList(Sequence[Record]):
    """Records in 29 bytes each. Slices are picklable `RecordList`s."""

    def __init__(self, columns: np.ndarray) -> None:
        """Wraps an array of dtype `RecordList.DTYPE`."""
        self._columns = columns

    DTYPE = np.dtype(
        [("row", "<u4"), ("start", "<u8"), ("length", "<u8"), ("identity", "u1"), ("group", "<u8")]
    )

    def __len__(self) -> int:
        return len(self._columns)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> RecordList: ...
    def __getitem__(self, index: int | slice) -> Record | RecordList:
        if isinstance(index, slice):
            return RecordList(self._columns[index].copy())
        row, start, length, identity, group = self._columns[index].item()
        return Record(Place(row, start, length), identity, group)


@dataclasses.dataclass
class Scan:
    """Result of scanning a list.

    Attributes:
      records: [n] of `RecordList.DTYPE`, with identities.
      nodes: (record, digest) pairs of what must stay in one split, such as images. [m, 2] uint64.
      labels: label of each record, an index into `names`, or -1.
      names: names of the labels.
    """

    records: np.ndarray
    nodes: np.ndarray
    labels: np.ndarray
    names: list[str]


def scan(
    path: str,
    nodes_of: Callable[[Mapping[str, Any]], Sequence[bytes]] | None = None,
    label_of: Callable[[Mapping[str, Any]], str | None] | None = None,
) -> Scan:
    """Scans a list once.

    Args:
      path: path of the file.
      nodes_of: returns what must stay in one split, for every record that is an object.
      label_of: returns the label of a record, such as its split, or None.

    Raises:
      UserError: the file cannot be read as a list of records.
    """
    rows, starts, lengths, ids, contents, owners, digests = (array.array("Q") for _ in range(7))
    labels = array.array("q")
    names: dict[str, int] = {}
    for place, data in record_files.walk(path):
        position = len(rows)
        rows.append(place.row)
        starts.append(place.start)
        lengths.append(place.length)
        try:
            record = record_files.parse(data)
            name = record_id(record, place.row)
        except (record_files.NotRecord, SkipItem):
            # Skipped when it is converted; until then it counts as unique.
            ids.append(record_files.digest(b"row\0%d" % place.row))
            contents.append(ids[-1])
            labels.append(-1)
            continue
        ids.append(record_files.digest(b"id\0" + _encoded(name)))
        contents.append(record_files.digest(data))
        label = label_of(record) if label_of else None
        labels.append(-1 if label is None else names.setdefault(label, len(names)))
        for node in nodes_of(record) if nodes_of else ():
            owners.append(position)
            digests.append(record_files.digest(node))
    records = np.zeros(len(rows), RecordList.DTYPE)
    records["row"], records["start"], records["length"] = map(_uint64, (rows, starts, lengths))
    records["identity"] = _identities(_uint64(ids), _uint64(contents))
    nodes = np.stack([_uint64(owners), _uint64(digests)], axis=1)
    return Scan(records, nodes, np.array(labels, np.int64), list(names))


def _uint64(values: array.array[int]) -> np.ndarray:
    return np.frombuffer(values, np.uint64) if values else np.zeros(0, np.uint64)


def _identities(ids: np.ndarray, contents: np.ndarray) -> np.ndarray:
    out = np.full(len(ids), COPY, np.uint8)
    records, first = np.unique(np.stack([ids, contents], axis=1), axis=0, return_index=True)
    _, of_id, counts = np.unique(records[:, 0], return_inverse=True, return_counts=True)
    out[first] = np.where(counts[of_id] > 1, SHARED_ID, UNIQUE)
    return out


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def split_of(
    path: str, records: np.ndarray, make: Callable[..., Iterable[Example]], expected: int | None = None
) -> Split:
    """Returns a split of some `Scan.records` of the list at `path`; `make` is called with `path=` too."""
    name_of = functools.partial(_name_of, file=os.path.basename(path))
    return Split(RecordList(records), functools.partial(make, path=path), name_of, expected)


def _name_of(item: Record, *, file: str) -> str:
    return f"{file} record {item.place.row}"


def record_id(record: Mapping[str, Any], row: int) -> str:
    """Returns the id of a record, by default its row.

    Raises:
      SkipItem: the id is neither text nor number, or too long.
    """
    value = record.get("id")
    if value is None or value == "":
        return f"row{row}"
    name = text_of(value, "id").strip()
    if len(name) > _MAX_ID:
        raise SkipItem(f"the id has {len(name)} characters; up to {_MAX_ID} are read")
    return name


def image_names(record: Mapping[str, Any]) -> list[Any]:
    """Returns the image paths or base64 images of a record, unchecked."""
    for key in _IMAGE_KEYS:
        value = record.get(key)
        if value:
            return list(value) if isinstance(value, list) else [value]
    return _without_images(record)[1]


def read_record(context: Context, path: str, item: Record) -> tuple[str, dict[str, Any]]:
    """Reads a record: (its id, unique in the list; the object).

    Raises:
      SkipItem: it is a copy of an earlier record, or unreadable.
    """
    context.file(os.path.relpath(path, context.root))  # records the list as an input of the shard
    data = record_files.read(path, item.place)
    try:
        record = record_files.parse(data)
    except record_files.NotRecord as reason:
        raise SkipItem(str(reason)) from None
    name = record_id(record, item.place.row)
    if item.identity == COPY:
        raise SkipItem("is a copy of an earlier record")
    if item.identity == SHARED_ID:
        name = f"{name}#{record_files.digest(data):016x}"
    return name, record


def dialogue(name: str, record: Mapping[str, Any], ref: Callable[[ImageRef | str], ImageRef]) -> Example:
    """Converts a record to a conversation.

    Args:
      name: record id.
      record: in any format of this module.
      ref: opens an image, given a path of the record or a slice of a volume.

    Returns:
      A conversation; `meta` is taken from the record's `vilam3` key.

    Raises:
      SkipItem, UserError: a field is missing or has the wrong type.
    """
    names = image_names(record)
    if len(names) > _MAX_IMAGES:
        raise SkipItem(f"has {len(names)} images; up to {_MAX_IMAGES} are read")
    stored: dict[int, ImageRef] = {}
    paths = []
    for position, value in enumerate(names):
        if not isinstance(value, str) or not value:
            raise SkipItem(f"image {position} is not a path")
        image = _base64(value, position)
        if image is not None:
            stored[position] = image
        paths.append(value if image is None else f"stored/{position}")
    item = {"id": _ANY, "images": paths, "conversations": _messages(record)}
    item |= {key: record[key] for key in _EXTENSIONS if key in record}
    try:
        example = from_instruction(item)
    except UserError as error:
        # The id may identify a patient, so the reason omits it.
        text = str(error)
        for start in (f"instruction item {_ANY!r}: ", f"example {_ANY!r}: "):
            text = text.removeprefix(start)
        raise SkipItem(text) from None
    if any(turn.supervised and not turn.text.strip() for turn in example.turns):
        raise SkipItem("an answer is empty")
    images = tuple(
        stored[position] if position in stored else ref(image if image.axis is not None else image.path or "")
        for position, image in enumerate(example.images)
    )
    return dataclasses.replace(example, id=name, images=images)


def _base64(text: str, position: int) -> ImageRef | None:
    """Decodes an embedded image; None if `text` is a path."""
    if text.startswith("data:image/"):
        text = text.partition(",")[2]
    elif not text.startswith(_BASE64) or len(text) % 4:
        if len(text) > _MAX_PATH:
            raise SkipItem(f"image {position} is neither a path nor a base64 image")
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SkipItem(f"image {position} is not valid base64") from None
    return stored_image(data, str(position))


def _messages(record: Mapping[str, Any]) -> Any:
    """Returns the dialogue in the format of `from_instruction`."""
    if "question" in record and not any(record.get(key) for key in DIALOGUE_KEYS):
        answer = record.get("answer")
        question = text_of(record["question"], "question")
        lacking = 0 if IMAGE_MARKER in question else len(image_names(record))
        return [
            {"from": "human", "value": f"{IMAGE_MARKER}\n" * lacking + question},
            {
                "from": "gpt",
                "value": text_of(answer[0] if isinstance(answer, list) and answer else answer, "answer"),
            },
        ]
    messages, _ = _without_images(record)
    if not messages:
        raise SkipItem(f"has no dialogue under any of {', '.join(DIALOGUE_KEYS)}, question")
    return messages


def _without_images(record: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Returns (the dialogue, images named in its parts), the images replaced by placeholders."""
    messages = next((record[key] for key in DIALOGUE_KEYS if record.get(key)), [])
    if not isinstance(messages, list):
        return messages, []
    images: list[Any] = []
    turns = [
        _without_parts(message, images) if isinstance(message, dict) else message for message in messages
    ]
    return turns, images


def _without_parts(message: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    key = "content" if "content" in message else "value"
    content = message.get(key)
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
            named = part.get("image_url", part.get("image"))
            named = named.get("url") if isinstance(named, dict) else named
            images += [] if named is None else [named]
            part = {"type": "image"}
        parts.append(part)
    return {**message, key: parts}


def caption_of(example: Example) -> str:
    """Returns the answer of a dialogue that asks for a caption.

    Raises:
      SkipItem: there are several answers.
    """
    answers = [turn.text for turn in example.turns if turn.role == "assistant"]
    if len(answers) != 1:
        raise SkipItem(f"has {len(answers)} answers, a caption is one")
    return text_of(answers[0], "caption")


def questions_of(example: Example) -> list[dict[str, Any]]:
    """Returns `meta["qa"]` of a dialogue about at most one image.

    With several images it is unknown which one a question refers to.
    """
    if len(example.images) > 1:
        return []
    out = []
    for before, turn in zip(example.turns, example.turns[1:], strict=False):
        if before.role != "user" or turn.role != "assistant":
            continue
        question, answer = before.text.replace(IMAGE_MARKER, "").strip(), turn.text.strip()
        if question and answer:
            out.append(free_question(question, answer))
    return out
