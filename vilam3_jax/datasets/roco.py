"""ROCO, version 1: figures of open-access articles with captions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from vilam3_jax.datasets.dataset import Split
from vilam3_jax.datasets.figure_captions import Figure, FigureDataset, modality_of
from vilam3_jax.datasets.source_files import SourceFolder

_SPLITS = ("train", "validation", "test")
_EXPECTED = {
    "radiology": {"train": 65_448, "validation": 8_180, "test": 8_179},
    "non-radiology": {"train": 4_895, "validation": 611, "test": 612},
}
# PMC_ID combines article and figure file: PMC<number>_<file>.jpg.
_LICENCES = {"id": ("ROCO_ID",), "file": ("PMC_ID",), "licence": ("CC",)}
_ID = re.compile(r"ROCO_\d+")
_ARTICLE = re.compile(r"PMC\d+")


class Roco(FigureDataset):
    """Images with captions, as downloaded by the repository's `fetch.py`: `images/ROCO_<5 digits>.jpg`.

    The repository contains no images, and some are no longer available; such figures are skipped. Each
    record states the licence of its figure. The modality of radiological images is derived from the UMLS
    concepts of the caption.
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

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        base = "data/" if source.find("data") else ""
        folders = {split: f"{base}{split}/{self.config}" for split in _SPLITS}
        files = ("captions.txt", "cuis.txt", "licences.txt", "images")
        source.require(*(f"{folder}/{file}" for folder in folders.values() for file in files))
        taken: set[str] = set()
        expected = _EXPECTED[self.config]
        return {
            split: self.figure_split(
                f"{folder}/captions.txt", _figures(source, folder), taken, expected[split]
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
        # Concepts come from the caption, which may describe a photograph of a scanner.
        modality = modality_of(cuis) if folder.endswith("/radiology") else ""
        yield number, Figure(f"{folder}/images", f"{name}.jpg", caption, cuis, modality, more)
