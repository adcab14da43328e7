"""Dialogues of one's own: a VILA or LLaVA list of instructions with its images."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import instruction_lists
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.instruction_lists import Record, Scan
from vilam3_jax.datasets.own_splits import STATED, groups_of, held_out, split_named
from vilam3_jax.datasets.pictures import picture_or_dicom
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths


class Instructions(Dataset):
    """A JSON list or JSON lines of dialogues, with a folder of images.

    Records that share an image or, where `--patient` names its key, a patient, stay in one split. A record
    moves between splits only if a new one ties it to others: the side depends on a hash of what is shared.
    An id that several records have gets a digest of the record as its end; of equal records one is kept.
    """

    name = "instructions"
    description = "Dialogues of one's own in the form of VILA and LLaVA."
    licence = "unverified"
    access = "credentialed"
    instructions = (
        "--source is a .json list or .jsonl file of records: `id`, `image` (or `images`), paths below "
        "--images, and `conversations` of `from`/`value` or `messages` of `role`/`content`."
    )
    source_is_file: ClassVar[bool] = True

    def __init__(self, options: argparse.Namespace | None = None, config: str = "") -> None:
        """Checks the options.

        Raises:
          UserError: `--heldout` is no share.
        """
        super().__init__(options, config)
        self._images = self.options.images
        if not 0 <= self.options.heldout < 1:
            raise UserError(f"--heldout {self.options.heldout}: give a share from 0 up to, but not, 1")
        self._patient = self.options.patient or ("patient" if self.options.split_by == "patient" else None)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares where images lie, how records are split, and what is known of them."""
        parser.add_argument(
            "--images", help="folder below which the records' images lie; default: that of --source"
        )
        parser.add_argument(
            "--split-by",
            choices=("patient", "hash"),
            default="hash",
            help="what stays together: records of a patient and an image, or of an image (the default)",
        )
        parser.add_argument(
            "--patient",
            metavar="KEY",
            help="key of a record that names the patient, a.b for nested ones",
        )
        parser.add_argument(
            "--heldout", type=float, default=0.1, metavar="SHARE", help="share that is held out"
        )
        parser.add_argument(
            "--split", metavar="KEY", help="key of a record that states its split; --heldout is not used"
        )
        parser.add_argument(
            "--modality", default="", help="CT, MR, CXR, ... of all images, for experts and tables"
        )
        parser.add_argument("--licence", default="", help="SPDX id or name of the terms of these data")

    def context(self, source: SourceFolder, split: str, **settings: Any) -> Context:
        """As of any dataset, but the root is the folder of the images."""
        given = super().context(source, split, **settings)
        root = str(paths.as_path(self._images)) if self._images else given.root
        return dataclasses.replace(given, root=root, licence=self.options.licence or given.licence)

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Walks once through the list."""
        file = getattr(self.options, "source_file", None)
        if not file:
            raise UserError(f"{source.root}: give the list itself as --source. {self.instructions}")
        if self._images and not paths.as_path(self._images).is_dir():
            raise UserError(
                f"--images {self._images}: no such folder; give the folder that records name images in"
            )
        path = str(source.root / file)
        patient, split = self._patient, self.options.split
        found = instruction_lists.scan(
            path,
            functools.partial(ties, patient=patient),
            functools.partial(_stated_split, key=split) if split else None,
        )
        if not len(found.records):
            raise UserError(f"{path}: holds no record; export or download it again")
        records = found.records
        records["group"] = groups = groups_of(len(records), found.nodes, records["start"])
        usable = np.isin(np.arange(len(records)), found.nodes[:, 0])  # the others are no dialogues
        sides = _stated(found, path, split) if split else held_out(groups, self.options.heldout, path, usable)
        make = functools.partial(_make, patient=patient, stated=split or "", modality=self.options.modality)
        return {
            side: instruction_lists.split_of(path, records[chosen], make)
            for side, chosen in sides.items()
            if chosen.any()
        }


def ties(record: Mapping[str, Any], *, patient: str | None) -> list[bytes]:
    """What ties a record to others: its images and its patient; of a text alone, its dialogue.

    Args:
      record: of a list.
      patient: the key that names the patient, or None.

    Returns:
      Nothing for a record that is known to be skipped.
    """
    shared = []
    if patient:
        try:
            known = text_of(_nested(record, patient), "patient")
        except SkipItem:
            return []
        shared.append(b"patient\0" + known.encode())
    for image in instruction_lists.image_names(record):
        if isinstance(image, str):
            name = os.path.normpath(image.strip().replace("\\", "/"))
            shared.append(b"image\0" + name.encode("utf-8", "surrogatepass"))
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
    """Split → [n] bool; records that state none go to the first, where they are skipped by name."""
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
    """A picture as bytes; a DICOM file or a slice of a volume by its path.

    Raises:
      SkipItem: it cannot be used. A path of one's own data may name a patient, so it stays out of the reason.
    """
    path = image if isinstance(image, str) else image.path or ""
    try:
        if isinstance(image, str):
            return picture_or_dicom(context, image)
        assert image.axis is not None  # as `dialogue` promises
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
