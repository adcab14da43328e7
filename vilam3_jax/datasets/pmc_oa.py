"""PMC-OA: sub-figures of open-access articles with their part of the caption."""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vilam3_jax.datasets import figure_captions
from vilam3_jax.datasets.dataset import Dataset, Split
from vilam3_jax.datasets.figure_captions import Figure
from vilam3_jax.datasets.rows import name_of, rows_of
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_FILES = {
    "subcaptions": {"train": "pmc_oa.jsonl"},
    "captions": {"train": "pmc_oa_beta.jsonl"},
    "splits": {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl"},
}
_INNER = "caption_T060_filtered_top4_sep_v0_subfigures"
_IMAGE_ROOTS = (f"images/{_INNER}", _INNER, "images")
_ARTICLE = re.compile(r"(PMC\d+)_")


class PmcOa(Dataset):
    """Images with captions of PubMed Central.

    Choices of ours: an example's id is the image's name without its extension. `meta.article` is the PMC
    number, to find the same article in PMC-VQA or LLaVA-Med. Alignment scores are kept as
    `meta.alignment_score`.
    """

    name = "pmc_oa"
    description = "Sub-figures of open-access articles with their part of the caption."
    homepage = "https://huggingface.co/datasets/axiong/pmc_oa"
    citation = (
        "Lin et al., PMC-CLIP: Contrastive Language-Image Pre-training using Biomedical Documents, 2023"
    )
    licence = "unverified"
    instructions = """
        Fetch from https://huggingface.co/datasets/axiong/pmc_oa images.zip, unpacked to images/, and
        pmc_oa.jsonl for subcaptions, pmc_oa_beta.jsonl for captions, or train.jsonl, valid.jsonl and
        test.jsonl of the older revision for splits. If the images are in another folder of the source folder,
        name it with --image-root.
        """
    configs: Mapping[str, str] = {
        "subcaptions": "pmc_oa.jsonl: each sub-figure with its part of the caption",
        "captions": "pmc_oa_beta.jsonl: each sub-figure with the undivided caption",
        "splits": "the older train, valid and test files",
    }
    expert_inputs = False
    shared_images = "the source does not say that its splits divide figures"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--pairs` and `--image-root`."""
        figure_captions.add_pairs_option(parser)
        parser.add_argument(
            "--image-root",
            default="",
            metavar="FOLDER",
            help=f"folder of the images below the source folder; by default {' or '.join(_IMAGE_ROOTS)}",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Reads the JSON lines of the variant."""
        given = self.options.image_root.strip("/")
        files = _FILES[self.config]
        folder = source.require([given] if given else _IMAGE_ROOTS, *files.values())[0]
        make = functools.partial(figure_captions.make, kind="pair" if self.options.pairs else "caption")
        taken: set[str] = set()
        found = {}
        for split, file in files.items():
            figures = _figures(source.json_lines(file), folder)
            found[split] = Split(rows_of(file, figures, _stem, taken=taken), make, name_of)
            if not found[split].items:
                raise UserError(f"{source.root / file}: is empty; download it again")
        return found


def _figures(lines: Iterator[tuple[int, Any]], folder: str) -> Iterator[tuple[int, Any]]:
    """The lines as figures; only what is used of them stays in memory: there are more than a million."""
    for number, line in lines:
        if isinstance(line, ValueError):
            yield number, line
            continue
        values = line if isinstance(line, dict) else {}
        file = values.get("image")
        article = _ARTICLE.match(file) if isinstance(file, str) else None
        score = values.get("alignment_score")
        more: dict[str, Any] = {"article": article[1]} if article else {}
        if isinstance(score, float) and math.isfinite(score):
            more["alignment_score"] = score
        yield number, Figure(folder, file, values.get("caption"), more=more or None)


def _stem(figure: Figure) -> str:
    return figure.file.rpartition("/")[2].rpartition(".")[0]
