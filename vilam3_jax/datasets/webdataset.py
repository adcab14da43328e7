"""Tar shards of one's own, in the form of WebDataset or as img2dataset writes them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import instruction_lists, tar_shards
from vilam3_jax.datasets.conversations import metadata, pair, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.tar_shards import Sample
from vilam3_jax.errors import UserError

_PER_SHARD = 1_000
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


class WebDataset(Dataset):
    """Pictures with captions, or with dialogues, in tar files below the source folder.

    A shard belongs to the split that its folder or the start of its name says (`train-000.tar`,
    `val/000.tar`); others are for training. Ids are the shard's path and the sample's key. Shards are
    divided, samples are not looked at before: keep the samples of a patient in shards of one split.
    """

    name = "webdataset"
    description = "Tar shards of one's own: pictures with captions or dialogues."
    licence = "unverified"
    access = "credentialed"
    instructions = (
        "--source is a folder of .tar files whose samples have a picture (.jpg, .png, .webp, ...) and a "
        "caption in .txt or under `caption` in .json, or a dialogue under `conversations` in .json."
    )
    configs: Mapping[str, str] = {
        "caption": "image and caption",
        "pair": "image and caption for contrastive training",
        "conversation": "dialogues of .json",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares what is known of the samples."""
        parser.add_argument("--patient", metavar="KEY", help="key of .json that names the patient")
        parser.add_argument("--modality", default="", help="CT, MR, CXR, ... of all images")
        parser.add_argument("--licence", default="", help="SPDX id or name of the terms of these data")

    def context(self, source: SourceFolder, split: str, **settings: Any) -> Context:
        """As of any dataset, with the licence that the user states."""
        given = super().context(source, split, **settings)
        return dataclasses.replace(given, licence=self.options.licence or given.licence)

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Lists the shards."""
        found = shards(source)
        sides: dict[str, list[str]] = {}
        for shard in found:
            sides.setdefault(_split_of(shard), []).append(shard)
        make = functools.partial(_make, patient=self.options.patient, modality=self.options.modality)
        return {side: Split(items, make, per_item=_PER_SHARD) for side, items in sorted(sides.items())}


def shards(source: SourceFolder) -> list[str]:
    """Paths of all tar files below the source folder, and of img2dataset's folders of pictures, sorted.

    Raises:
      UserError: there is none, or some are packed.
    """
    found = set()
    for name in source.files():
        folder, base = os.path.split(name)
        suffix = base.rpartition(".")[2].lower()
        if base.startswith("."):
            continue
        if base.lower().endswith(_PACKED):
            raise UserError(
                f"{source.root / name}: a packed shard; unpack it to a .tar file, or move it away"
            )
        if suffix == "tar":
            found.add(name)
        elif suffix in tar_shards.PICTURES and re.fullmatch(r"\d{5,}", os.path.basename(folder)):
            found.add(folder)
    if not found:
        raise UserError(f"{source.root}: holds no .tar file; give the folder of the shards")
    return sorted(found)


def _split_of(shard: str) -> str:
    folder = shard.split("/")[0] if "/" in shard else ""
    start = re.match(r"[a-z]*", os.path.basename(shard).lower())
    return _SPLITS.get(folder.lower()) or _SPLITS.get(start[0] if start else "", "train")


def _make(shard: str, context: Context, *, patient: str | None, modality: str) -> Iterator[Example | Skipped]:
    for sample in tar_shards.samples(context, shard):
        if isinstance(sample, Skipped):
            yield sample
            continue
        name = f"{os.path.splitext(shard)[0]}/{sample.key}"
        try:
            if sample.problem:
                raise SkipItem(sample.problem)
            record = sample.record()
            known = text_of(record.get(patient), "patient") if patient else None
            meta = metadata(context, modality=modality, patient=known, group=None if patient else name)
            yield _example(name, sample, record, meta, context.config)
        except (SkipItem, UserError) as reason:
            yield Skipped(f"{shard}:{sample.key}", str(reason))


def _example(
    name: str, sample: Sample, record: Mapping[str, Any], meta: Mapping[str, Any], config: str
) -> Example:
    if config != "conversation":
        return pair(name, sample.picture(), tar_shards.caption(sample, record), meta, config)
    # The picture is a member; what the record calls it is of no account.
    has_picture = any(extension in sample.parts for extension in tar_shards.PICTURES)
    kept = {key: value for key, value in record.items() if key not in ("image", "images")}
    kept |= {"image": "member"} if has_picture else {}

    def opened(_: ImageRef | str) -> ImageRef:
        return sample.picture()

    example = instruction_lists.dialogue(name, kept, opened)
    questions = instruction_lists.questions_of(example)
    meta = {**meta, "qa": questions} if questions else dict(meta)
    return Example(name, "conversation", example.images, example.turns, meta=meta)
