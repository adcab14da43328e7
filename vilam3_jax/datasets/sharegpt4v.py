"""ShareGPT4V: detailed image descriptions by GPT-4V and its captioner, and an instruction mixture."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vilam3_jax.datasets import caption_lists, instruction_lists
from vilam3_jax.datasets.dataset import Dataset, Split
from vilam3_jax.datasets.image_files import ImageFiles
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_FILES = {
    "captions": "sharegpt4v_instruct_gpt4-vision_cap100k.json",
    "pretrain": "share-captioner_coco_lcs_sam_1246k_1107.json",
    "instruct": "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
}
_ROOTS = (
    "llava/llava_pretrain/images",
    "coco/train2017",
    "sam/images",
    "gqa/images",
    "ocr_vqa/images",
    "textvqa/train_images",
    "vg/VG_100K",
    "vg/VG_100K_2",
    "share_textvqa/images",
    "web-celebrity/images",
    "web-landmark/images",
    "wikiart/images",
)
_TEXT = "text"


class ShareGpt4V(Dataset):
    """Dialogues about images of other datasets, in folders next to the list.

    A missing image folder is an error, unless `--leave-out` excludes its records. Records without an image
    are kept as text.
    """

    name = "sharegpt4v"
    description = "Detailed image descriptions, and an instruction mixture (ShareGPT4V)."
    homepage = "https://github.com/ShareGPT4Omni/ShareGPT4V"
    citation = "Chen et al., ShareGPT4V: Improving Large Multi-Modal Models with Better Captions, ECCV 2024"
    licence = "CC-BY-NC-4.0"
    instructions = (
        "Fetch the variant's list from https://huggingface.co/datasets/Lin-Chen/ShareGPT4V, and the images "
        "as described in docs/Data.md of https://github.com/ShareGPT4Omni/ShareGPT4V, to the folders "
        f"named there ({', '.join(_ROOTS)}), below data/ or next to the list."
    )
    configs: Mapping[str, str] = {
        "pretrain": "1,246k descriptions by the captioner",
        "captions": "102k descriptions by GPT-4V",
        "instruct": "the mixture of 665k dialogues",
    }
    expert_inputs = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--leave-out",
            default="",
            metavar="FOLDER,...",
            help="image folders, such as sam/images, whose records are excluded",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        (file,) = source.require(_FILES[self.config])
        path = str(source.root / file)
        found = instruction_lists.scan(path, label_of=_root_of)
        named = {name: number for number, name in enumerate(found.names) if name != _TEXT}
        left_out = {name.strip().strip("/") for name in self.options.leave_out.split(",")} - {""}
        if unknown := left_out - set(named):
            raise UserError(
                f"--leave-out {', '.join(sorted(unknown))}: {path} names no such folder; it names "
                + ", ".join(sorted(named))
            )
        below = "data/" if source.find("data") else ""
        wanted = sorted(set(named) - left_out)
        if missing := [f"{below}{name}" for name in wanted if source.find(f"{below}{name}") is None]:
            raise UserError(
                f"{source.root}: {', '.join(missing)} missing; fetch them or give them to --leave-out. "
                f"{self.instructions}"
            )
        kept = ~np.isin(found.labels, [named[name] for name in left_out])
        image_files = ImageFiles(below.rstrip("/"))
        make = functools.partial(caption_lists.make, image_files=image_files, form="conversation")
        return {"train": instruction_lists.split_of(path, found.records[kept], make)}


def _root_of(record: Mapping[str, Any]) -> str | None:
    names = instruction_lists.image_names(record)
    if not names:
        return _TEXT
    if not isinstance(names[0], str):
        return None
    name = names[0].strip().lstrip("/")
    known = [root for root in _ROOTS if name.startswith(f"{root}/")]
    return known[0] if known else name.rpartition("/")[0].partition("/")[0] or None
