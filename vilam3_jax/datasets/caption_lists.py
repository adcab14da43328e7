"""Caption lists in LLaVA's format, as dialogues, captions or pairs for contrastive training."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import instruction_lists
from vilam3_jax.datasets.conversations import metadata, pair
from vilam3_jax.datasets.dataset import Context, SkipItem
from vilam3_jax.datasets.image_files import ImageFiles
from vilam3_jax.datasets.instruction_lists import Record

CONFIGS = {
    "caption": "image and caption, without the instruction, as the plain template trains on",
    "conversation": "with the instruction that asks for the caption",
    "pair": "image and caption for contrastive training",
}


def make(
    item: Record, context: Context, *, path: str, image_files: ImageFiles, form: str = ""
) -> Iterator[Example]:
    """Yields the example of a record; `form` is a key of `CONFIGS`, by default `context.config`."""
    example, record = read(item, context, path, image_files)
    yield shaped(example, metadata(context, modality="", group=group_of(record)), form or context.config)


def read(
    item: Record, context: Context, path: str, image_files: ImageFiles
) -> tuple[Example, dict[str, Any]]:
    """Reads a record: (its dialogue, the record).

    Raises:
      SkipItem: the record names a slice of a volume, or is unusable.
    """
    name, record = instruction_lists.read_record(context, path, item)
    return instruction_lists.dialogue(name, record, functools.partial(_image, context, image_files)), record


def _image(context: Context, image_files: ImageFiles, image: ImageRef | str) -> ImageRef:
    if isinstance(image, ImageRef):
        raise SkipItem("names a slice of a volume")
    return image_files.ref(context, image)


def group_of(record: dict[str, object]) -> str | None:
    """Returns the path of the first image, which must stay in one split."""
    names = instruction_lists.image_names(record)
    return names[0] if names and isinstance(names[0], str) else None


def shaped(example: Example, meta: dict[str, object], form: str) -> Example:
    """Returns the dialogue, or its answer as the caption of its only image.

    Raises:
      SkipItem: a caption is requested, but there are several images or answers.
    """
    if form == "conversation":
        return Example(example.id, "conversation", example.images, example.turns, meta=meta)
    if len(example.images) != 1:
        raise SkipItem(f"has {len(example.images)} images, a caption has one")
    return pair(example.id, example.images[0], instruction_lists.caption_of(example), meta, form)
