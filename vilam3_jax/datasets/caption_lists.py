"""Released lists of captions in LLaVA's form, as dialogues, captions or pairs for contrastive training."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import instruction_lists
from vilam3_jax.datasets.conversations import metadata, pair
from vilam3_jax.datasets.dataset import Context, SkipItem
from vilam3_jax.datasets.instruction_lists import Record
from vilam3_jax.datasets.pictures import Pictures

CONFIGS = {
    "caption": "image and caption, without the instruction, as the plain template trains on",
    "conversation": "with the instruction that asks for the caption",
    "pair": "image and caption for contrastive training",
}


def make(item: Record, context: Context, *, path: str, pictures: Pictures) -> Iterator[Example]:
    """A record of a list as the variant `context.config` has it; see `CONFIGS`."""
    name, record = instruction_lists.read_record(context, path, item)
    example = instruction_lists.dialogue(name, record, functools.partial(picture, context, pictures))
    yield shaped(example, metadata(context, modality="", group=group_of(record)), context.config)


def picture(context: Context, pictures: Pictures, image: ImageRef | str) -> ImageRef:
    """The picture of a path. Released lists of pictures have no slices.

    Raises:
      SkipItem: it is a slice, or cannot be used.
    """
    if isinstance(image, ImageRef):
        raise SkipItem("names a slice of a volume")
    return pictures.ref(context, image)


def group_of(record: dict[str, object]) -> str | None:
    """What must not be divided between splits: the image's path."""
    names = instruction_lists.image_names(record)
    return names[0] if names and isinstance(names[0], str) else None


def shaped(example: Example, meta: dict[str, object], config: str) -> Example:
    """A dialogue as it is, or its answer as the caption of its only image.

    Raises:
      SkipItem: a caption is asked for, and it has several images or answers.
    """
    if config == "conversation":
        return Example(example.id, "conversation", example.images, example.turns, meta=meta)
    if len(example.images) != 1:
        raise SkipItem(f"has {len(example.images)} images, a caption has one")
    return pair(example.id, example.images[0], instruction_lists.caption_of(example), meta, config)
