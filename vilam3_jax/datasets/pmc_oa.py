"""PMC-OA: sub-figures of open-access articles with sub-captions."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vilam3_jax.datasets.dataset import Split
from vilam3_jax.datasets.figure_captions import Figure, FigureDataset
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


class PmcOa(FigureDataset):
    """Images with captions from PubMed Central.

    An example's id is the image name without its extension. `meta.article` is the PMC number, which
    identifies the article in PMC-VQA and LLaVA-Med. `meta.alignment_score` is the source's score.
    """

    name = "pmc_oa"
    description = "Sub-figures of open-access articles with sub-captions."
    homepage = "https://huggingface.co/datasets/axiong/pmc_oa"
    citation = (
        "Lin et al., PMC-CLIP: Contrastive Language-Image Pre-training using Biomedical Documents, 2023"
    )
    licence = "unverified"
    instructions = """
        Fetch from https://huggingface.co/datasets/axiong/pmc_oa images.zip, unpacked to images/, and
        pmc_oa.jsonl for subcaptions, pmc_oa_beta.jsonl for captions, or train.jsonl, valid.jsonl and
        test.jsonl of the older revision for splits. Give --image-root if the images are in another subfolder.
        """
    configs: Mapping[str, str] = {
        "subcaptions": "pmc_oa.jsonl: each sub-figure with its sub-caption",
        "captions": "pmc_oa_beta.jsonl: each sub-figure with the full caption",
        "splits": "the older train, valid and test files",
    }
    shared_images = "the source does not state that its splits divide figures"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--image-root",
            default="",
            metavar="FOLDER",
            help=f"image folder below the source folder (default: {' or '.join(_IMAGE_ROOTS)})",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        given = self.options.image_root.strip("/")
        files = _FILES[self.config]
        folder = source.require([given] if given else _IMAGE_ROOTS, *files.values())[0]
        taken: set[str] = set()
        found = {}
        for split, file in files.items():
            figures = _figures(source.json_lines(file), folder)
            found[split] = self.figure_split(file, figures, taken)
            if not found[split].items:
                raise UserError(f"{source.root / file}: is empty; download it again")
        return found


def _figures(lines: Iterator[tuple[int, Any]], folder: str) -> Iterator[tuple[int, Any]]:
    """Converts lines to figures, keeping only used fields: there are more than a million."""
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
