"""LLaVA-CC3M-Pretrain-595K: captioned web images, VILA's alignment data."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import caption_lists, instruction_lists
from vilam3_jax.datasets.conversations import metadata, pair, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.image_files import ImageFiles, find_image_files
from vilam3_jax.datasets.instruction_lists import Record
from vilam3_jax.datasets.source_files import SourceFolder

_CHAT, _METADATA = "chat.json", "metadata.json"
_RECORDS = 595_375


class Cc3m595k(Dataset):
    """595,375 images with the captions of `chat.json`.

    The variant `blip` uses BLIP's captions from `metadata.json`; about a tenth of the images has none and is
    skipped.
    """

    name = "cc3m_595k"
    description = "Captioned web images (LLaVA-CC3M-Pretrain-595K)."
    homepage = "https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K"
    citation = "Liu et al., Visual Instruction Tuning, 2023; Sharma et al., Conceptual Captions, 2018"
    licence = "CC-3M and BLIP terms, non-commercial"
    instructions = (
        "Fetch chat.json and images.zip (6.5 GB; packed, or unpacked to images/) from "
        "https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K; the variant blip reads "
        "metadata.json in place of chat.json."
    )
    configs: Mapping[str, str] = {**caption_lists.CONFIGS, "blip": "image and caption by BLIP"}
    expert_inputs = False

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        blip = self.config == "blip"
        (file, _) = source.require(_METADATA if blip else _CHAT, ("images", "images.zip"))
        image_files = find_image_files(source, ["images"], ["images.zip"])
        make = functools.partial(_make_blip if blip else caption_lists.make, image_files=image_files)
        path = str(source.root / file)
        records = instruction_lists.scan(path).records
        return {"train": instruction_lists.split_of(path, records, make, None if blip else _RECORDS)}


def _make_blip(item: Record, context: Context, *, path: str, image_files: ImageFiles) -> Iterator[Example]:
    name, record = instruction_lists.read_record(context, path, item)
    if not record.get("blip_caption"):
        raise SkipItem("has no BLIP caption")
    caption = text_of(record["blip_caption"], "BLIP caption")
    image = text_of(record.get("image"), "image name")
    meta = metadata(context, modality="", group=image, label_source="BLIP")
    yield pair(name, image_files.ref(context, os.path.basename(image)), caption, meta)
