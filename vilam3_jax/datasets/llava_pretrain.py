"""LLaVA-Pretrain-558K: images of LAION, CC and SBU with captions by BLIP."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from vilam3_jax.datasets import caption_lists, instruction_lists
from vilam3_jax.datasets.dataset import Dataset, Split
from vilam3_jax.datasets.image_files import find_image_files
from vilam3_jax.datasets.source_files import SourceFolder

_RECORDS = 558_128


class LlavaPretrain(Dataset):
    """558,128 images with captions."""

    name = "llava_pretrain"
    description = "Images of LAION, CC and SBU with captions by BLIP (LLaVA-Pretrain-558K)."
    homepage = "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain"
    citation = "Liu et al., Improved Baselines with Visual Instruction Tuning, CVPR 2024"
    licence = "CC-3M and BLIP terms, non-commercial"
    instructions = (
        "Fetch blip_laion_cc_sbu_558k.json and images.zip (packed, or unpacked to images/ or to 00000/ and "
        "so on) from https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain."
    )
    configs: Mapping[str, str] = caption_lists.CONFIGS
    expert_inputs = False

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        file, _ = source.require("blip_laion_cc_sbu_558k.json", ("images", "00000", "images.zip"))
        flat = source.find("images") is None and source.find("00000") is not None
        image_files = find_image_files(source, ["."] if flat else ["images"], ["images.zip"])
        path = str(source.root / file)
        make = functools.partial(caption_lists.make, image_files=image_files)
        return {
            "train": instruction_lists.split_of(path, instruction_lists.scan(path).records, make, _RECORDS)
        }
