"""User-supplied instruction lists in VILA's or LLaVA's format, with images."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import instruction_lists
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.image_files import image_or_dicom
from vilam3_jax.datasets.instruction_lists import Record, Scan
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.user_data import STATED, UserFile, groups_of, held_out, image_node, split_named
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths


class Instructions(UserFile):
    """A JSON list or JSON lines of dialogues, with a folder of images.

    Records that share an image or, with `--patient`, a patient stay in one split. Splits are drawn by hash,
    so adding unrelated records does not move a record to another split. Duplicate ids get a digest of the
    record as a suffix; of identical records one is kept.
    """

    name = "instructions"
    description = "User-supplied dialogues in VILA's or LLaVA's format."
    instructions = (
        "--source is a .json list or .jsonl file of records: `id`, `image` (or `images`), paths below "
        "--images, and `conversations` of `from`/`value` or `messages` of `role`/`content`."
    )
    field, metavar = "record key (a.b if nested)", "KEY"

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        path = str(source.root / self.source_file(source))
        split = self.options.split
        patient = self.options.patient or ("patient" if self.options.split_by == "patient" else None)
        found = instruction_lists.scan(
            path,
            functools.partial(ties, patient=patient),
            functools.partial(_stated_split, key=split) if split else None,
        )
        if not len(found.records):
            raise UserError(f"{path}: no records; export or download it again")
        records = found.records
        records["group"] = groups = groups_of(len(records), found.nodes, records["start"])
        usable = np.isin(np.arange(len(records)), found.nodes[:, 0])  # others are not dialogues
        sides = _stated(found, path, split) if split else held_out(groups, self.options.heldout, path, usable)
        make = functools.partial(_make, patient=patient, stated=split or "", modality=self.options.modality)
        return {
            side: instruction_lists.split_of(path, records[chosen], make)
            for side, chosen in sides.items()
            if chosen.any()
        }


def ties(record: Mapping[str, Any], *, patient: str | None) -> list[bytes]:
    """Returns what must stay in one split: images and patient, or the dialogue of a text-only record.

    Args:
      record: record of a list.
      patient: key of the patient id, or None.

    Returns:
      An empty list for a record that will be skipped.
    """
    shared = []
    if patient:
        try:
            known = text_of(_nested(record, patient), "patient")
        except SkipItem:
            return []
        shared.append(b"patient\0" + known.encode())
    names = instruction_lists.image_names(record)
    shared += [image_node(name) for name in names if isinstance(name, str)]
    if not shared:
        keys = (*instruction_lists.DIALOGUE_KEYS, "question")
        if words := next((record[key] for key in keys if record.get(key)), None):
            shared.append(b"text\0" + repr(words).encode("utf-8", "surrogatepass"))
    return shared


def _nested(record: Mapping[str, Any], key: str) -> Any:
    value: Any = record
    for part in [key] if key in record else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _stated_split(record: Mapping[str, Any], *, key: str) -> str | None:
    return split_named(_nested(record, key))


def _stated(found: Scan, path: str, key: str) -> dict[str, np.ndarray]:
    """Returns split → [n] bool. Records without a split go to the first one, where they are skipped."""
    if not found.names:
        raise UserError(f"{path}: no record has a split under {key!r} ({STATED})")
    sides = {name: found.labels == number for number, name in enumerate(found.names)}
    sides[found.names[0]] |= found.labels < 0
    return dict(sorted(sides.items()))


def _make(
    item: Record, context: Context, *, path: str, patient: str | None, stated: str, modality: str
) -> Iterator[Example]:
    name, record = instruction_lists.read_record(context, path, item)
    if stated and _stated_split(record, key=stated) is None:
        raise SkipItem(f"states no split under {stated!r} ({STATED})")
    known = text_of(_nested(record, patient), "patient") if patient else None
    example = instruction_lists.dialogue(name, record, functools.partial(_image, context=context))
    own = metadata(
        context,
        modality=modality or str(example.meta.get("modality", "")),
        patient=known,
        group=None if patient else f"{item.group:016x}",
    )
    questions = example.meta.get("qa") or instruction_lists.questions_of(example)
    meta = {**example.meta, **own, **({"qa": questions} if questions else {})}
    yield Example(example.id, example.format, example.images, example.turns, example.expert_requests, meta)


def _image(image: ImageRef | str, *, context: Context) -> ImageRef:
    """Returns an image as bytes, a DICOM file or a slice of a volume by path.

    Raises:
      SkipItem: it is unusable. The reason omits the path, which may identify a patient.
    """
    path = image if isinstance(image, str) else image.path or ""
    try:
        if isinstance(image, str):
            return image_or_dicom(context, image)
        assert image.axis is not None  # guaranteed by `dialogue`
        return context.volume(
            path, axis=image.axis, index=image.index, window=image.window, modality=image.modality
        )
    except UnavailableError:
        raise
    except (SkipItem, UserError) as reason:
        text = str(reason).replace(f"{paths.as_path(context.root) / path}: ", "its image ")
        for name in (path, os.path.normpath(path.replace("\\", "/"))):
            text = text.replace(f"image {name} ", "its image ").replace(f"volume {name} ", "its volume ")
        raise SkipItem(text) from None
