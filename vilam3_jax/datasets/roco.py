"""ROCO, the first version: figures of open-access articles with captions; images fetched by the user."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterator, Mapping

from vilam3_jax.datasets import figure_captions
from vilam3_jax.datasets.dataset import Dataset, Split
from vilam3_jax.datasets.figure_captions import Figure, modality_of
from vilam3_jax.datasets.rows import name_of, rows_of
from vilam3_jax.datasets.source_files import SourceFolder

_SPLITS = ("train", "validation", "test")
_EXPECTED = {
    "radiology": {"train": 65_448, "validation": 8_180, "test": 8_179},
    "non-radiology": {"train": 4_895, "validation": 611, "test": 612},
}
# PMC_ID holds the article and the name of the figure's file: PMC<number>_<file>.jpg.
_LICENCES = {"id": ("ROCO_ID",), "file": ("PMC_ID",), "licence": ("CC",)}
_ID = re.compile(r"ROCO_\d+")
_ARTICLE = re.compile(r"PMC\d+")


class Roco(Dataset):
    """Images with captions, as `fetch.py` of the repository leaves them: `images/ROCO_<5 digits>.jpg`.

    The repository ships no images, and not every one can still be fetched: a figure without one is skipped.
    Each record has the licence of its figure, in the source's words. The modality of radiological images
    comes from concepts that were found in the caption.
    """

    name = "roco"
    description = "Figures of open-access articles with captions and UMLS concepts, first version."
    homepage = "https://github.com/razorx89/roco-dataset"
    citation = "Pelka et al., Radiology Objects in COntext (ROCO): A Multimodal Image Dataset, 2018"
    licence = "per image (licences.txt)"
    instructions = """
        Clone https://github.com/razorx89/roco-dataset and run its scripts/fetch.py, which fills
        data/{train,validation,test}/{radiology,non-radiology}/images. The source folder is the clone.
        """
    configs: Mapping[str, str] = {
        "radiology": "radiological images",
        "non-radiology": "other figures, such as synthetic ones and photographs",
    }
    expert_inputs = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--pairs`."""
        figure_captions.add_pairs_option(parser)

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Reads captions, concepts and licences of the three splits."""
        base = "data/" if source.find("data") else ""
        folders = {split: f"{base}{split}/{self.config}" for split in _SPLITS}
        files = ("captions.txt", "cuis.txt", "licences.txt", "images")
        source.require(*(f"{folder}/{file}" for folder in folders.values() for file in files))
        make = functools.partial(figure_captions.make, kind="pair" if self.options.pairs else "caption")
        taken: set[str] = set()
        return {
            split: Split(
                rows_of(f"{folder}/captions.txt", _figures(source, folder), _stem, taken=taken),
                make,
                name_of,
                _EXPECTED[self.config][split],
            )
            for split, folder in folders.items()
        }


def _figures(source: SourceFolder, folder: str) -> Iterator[tuple[int, Figure | ValueError]]:
    concepts = {}
    for line in source.lines(f"{folder}/cuis.txt"):
        name, *cuis = line.split("\t")
        concepts[name] = tuple(cui.strip() for cui in cuis if cui.strip())
    licences = {row["id"].strip(): row for row in source.table(f"{folder}/licences.txt", _LICENCES)}
    for number, line in enumerate(source.lines(f"{folder}/captions.txt"), 1):
        name, _, caption = line.partition("\t")
        if not _ID.fullmatch(name):
            yield number, ValueError("has no ROCO id")
            continue
        cuis, terms = concepts.get(name, ()), licences.get(name, {})
        article = _ARTICLE.match(terms.get("file", ""))
        more = {"article": article[0]} if article else {}
        if licence := terms.get("licence", "").strip():
            more["licence"] = licence
        # The concepts are words of the caption: of a photograph of a scanner they tell no modality.
        modality = modality_of(cuis) if folder.endswith("/radiology") else ""
        yield number, Figure(f"{folder}/images", f"{name}.jpg", caption, cuis, modality, more)


def _stem(figure: Figure) -> str:
    return figure.file.removesuffix(".jpg")
