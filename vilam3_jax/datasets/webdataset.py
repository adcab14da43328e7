"""User-supplied tar shards in WebDataset's format, as also written by img2dataset."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import instruction_lists, tar_shards
from vilam3_jax.datasets.conversations import metadata, pair, text_of
from vilam3_jax.datasets.dataset import Context, SkipItem, Skipped, Split
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.tar_shards import Sample
from vilam3_jax.datasets.user_data import UserDataset
from vilam3_jax.errors import UserError

_PER_SHARD = 1_000
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_SPLITS = {"train": "train", **dict.fromkeys(("val", "valid", "validation"), "validation"), "test": "test"}
_T = TypeVar("_T")


class WebDataset(UserDataset):
    """Images with captions or dialogues, in tar files below the source folder.

    The split of a shard follows from its folder or the start of its name (`train-000.tar`, `val/000.tar`), by
    default train. Ids consist of shard path and sample key. Splits are not checked for shared patients: keep
    a patient's samples in shards of one split.
    """

    name = "webdataset"
    description = "User-supplied tar shards: images with captions or dialogues."
    instructions = (
        "--source is a folder of .tar files whose samples have an image (.jpg, .png, .webp, ...) and a "
        "caption in .txt or under `caption` in .json, or a dialogue under `conversations` in .json."
    )
    configs: Mapping[str, str] = {
        "caption": "image and caption",
        "pair": "image and caption for contrastive training",
        "conversation": "dialogues in .json",
    }
    field, metavar = "key of .json", "KEY"

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        sides: dict[str, list[str]] = {}
        for shard in shards(source):
            sides.setdefault(_split_of(shard), []).append(shard)
        make = functools.partial(_make, patient=self.options.patient, modality=self.options.modality)
        return {side: Split(items, make, per_item=_PER_SHARD) for side, items in sorted(sides.items())}


def shards(source: SourceFolder) -> list[str]:
    """Returns the sorted paths of all tar files, and of img2dataset's image folders.

    Raises:
      UserError: there are none, or some are compressed.
    """
    found = set()
    for name in source.files():
        folder, base = os.path.split(name)
        suffix = base.rpartition(".")[2].lower()
        if base.startswith("."):
            continue
        if base.lower().endswith(_PACKED):
            raise UserError(f"{source.root / name}: a compressed shard; decompress it, or move it away")
        if suffix == "tar":
            found.add(name)
        elif suffix in tar_shards.IMAGE_EXTENSIONS and re.fullmatch(r"\d{5,}", os.path.basename(folder)):
            found.add(folder)
    if not found:
        raise UserError(f"{source.root}: contains no .tar file; give the folder of the shards")
    return sorted(found)


def convert_samples(
    context: Context, shard: str, make: Callable[[str, Sample, dict[str, Any]], _T]
) -> Iterator[_T | Skipped]:
    """Yields `make(id, sample, record)` for the samples of a shard, and the skipped ones."""
    for sample in tar_shards.samples(context, shard):
        if isinstance(sample, Skipped):
            yield sample
            continue
        try:
            if sample.problem:
                raise SkipItem(sample.problem)
            yield make(f"{os.path.splitext(shard)[0]}/{sample.key}", sample, sample.record())
        except (SkipItem, UserError) as reason:
            yield Skipped(f"{shard}:{sample.key}", str(reason))


def _split_of(shard: str) -> str:
    folder = shard.split("/")[0] if "/" in shard else ""
    start = re.match(r"[a-z]*", os.path.basename(shard).lower())
    return _SPLITS.get(folder.lower()) or _SPLITS.get(start[0] if start else "", "train")


def _make(shard: str, context: Context, *, patient: str | None, modality: str) -> Iterator[Example | Skipped]:
    def example(name: str, sample: Sample, record: dict[str, Any]) -> Example:
        known = text_of(record.get(patient), "patient") if patient else None
        meta = metadata(context, modality=modality, patient=known, group=None if patient else name)
        if context.config != "conversation":
            return pair(name, sample.image(), tar_shards.caption(sample, record), meta, context.config)
        # The image is a member, whatever its name in the record.
        has_image = any(extension in sample.parts for extension in tar_shards.IMAGE_EXTENSIONS)
        kept = {key: value for key, value in record.items() if key not in ("image", "images")}
        kept |= {"image": "member"} if has_image else {}
        made = instruction_lists.dialogue(name, kept, lambda _: sample.image())
        questions = instruction_lists.questions_of(made)
        meta |= {"qa": questions} if questions else {}
        return Example(name, "conversation", made.images, made.turns, meta=meta)

    yield from convert_samples(context, shard, example)
