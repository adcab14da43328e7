"""ROCOv2: radiological figures of open-access articles with captions and UMLS concepts."""

from __future__ import annotations

from collections.abc import Mapping

from vilam3_jax.datasets.dataset import Split
from vilam3_jax.datasets.figure_captions import Figure, FigureDataset, modality_of
from vilam3_jax.datasets.source_files import SourceFolder

_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
_EXPECTED = {"train": 59_958, "validation": 9_904, "test": 9_927}
_CAPTIONS = {"id": ("ID",), "caption": ("Caption",)}
_CONCEPTS = {"id": ("ID",), "concepts": ("CUIs",)}


class RocoV2(FigureDataset):
    """Images with captions; `meta.concepts` lists UMLS concepts, which determine the modality.

    Licences differ between images; the source lists them in `license_information.csv`.
    """

    name = "roco_v2"
    description = "Radiological figures of open-access articles with captions and UMLS concepts."
    homepage = "https://zenodo.org/records/10821435"
    citation = "Rückert et al., ROCOv2: Radiology Objects in COntext Version 2, Scientific Data 2024"
    licence = "per image (license_information.csv)"
    instructions = """
        Fetch from https://zenodo.org/records/10821435 {train,valid,test}_captions.csv,
        {train,valid,test}_concepts.csv and {train,valid,test}_images.zip, each unpacked to
        train_images/train/ (or train/) and likewise for valid and test.
        """

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        stems = list(_SPLITS.values())
        found = source.require(
            *([f"{stem}_images/{stem}", stem, f"{stem}_images"] for stem in stems),
            *(f"{stem}_{table}.csv" for table in ("captions", "concepts") for stem in stems),
        )
        folders = dict(zip(stems, found, strict=False))
        taken: set[str] = set()
        splits = {}
        for split, stem in _SPLITS.items():
            file = f"{stem}_captions.csv"
            concepts = {
                row["id"].strip(): tuple(cui.strip() for cui in row["concepts"].split(";") if cui.strip())
                for row in source.table(f"{stem}_concepts.csv", _CONCEPTS)
            }
            figures = []
            for row in source.table(file, _CAPTIONS):
                name = row["id"].strip()
                cuis, image = concepts.get(name, ()), f"{name}.jpg" if name else ""
                figures.append(Figure(folders[stem], image, row["caption"], cuis, modality_of(cuis)))
            splits[split] = self.figure_split(file, enumerate(figures, 1), taken, _EXPECTED[split])
        return splits
