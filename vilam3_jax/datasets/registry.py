"""Datasets by name. Other packages register datasets under the entry-point group `vilam3.datasets`."""

from __future__ import annotations

import importlib
import importlib.metadata

from vilam3_jax.datasets.dataset import Dataset
from vilam3_jax.errors import UserError

ENTRY_POINTS = "vilam3.datasets"

# Name → (module, class), sorted.
DATASETS: dict[str, tuple[str, str]] = {
    "brats": ("brats", "BraTS"),
    "cc3m_595k": ("cc3m_595k", "Cc3m595k"),
    "chest_xray14": ("chest_xray14", "ChestXray14"),
    "chexpert": ("chexpert", "CheXpert"),
    "coyo": ("coyo", "Coyo"),
    "ct_rate": ("ct_rate", "CtRate"),
    "expert_slices": ("expert_slices", "ExpertSlices"),
    "flare_mllm_2d": ("flare_mllm_2d", "FlareMllm2d"),
    "instructions": ("instructions", "Instructions"),
    "iu_xray": ("iu_xray", "IuXray"),
    "llava_med": ("llava_med", "LlavaMed"),
    "llava_pretrain": ("llava_pretrain", "LlavaPretrain"),
    "medical_diff_vqa": ("medical_diff_vqa", "MedicalDiffVqa"),
    "medqa": ("medqa", "MedQa"),
    "medxpert_qa": ("medxpert_qa", "MedXpertQa"),
    "mimic_annotation": ("mimic_annotation", "MimicAnnotation"),
    "mimic_cxr_class": ("mimic_cxr_class", "MimicCxrClass"),
    "mimic_cxr_reports": ("mimic_cxr_reports", "MimicCxrReports"),
    "mmc4": ("mmc4", "Mmc4"),
    "msd": ("msd", "MSD"),
    "omni_med_vqa": ("omni_med_vqa", "OmniMedVqa"),
    "path_vqa": ("path_vqa", "PathVqa"),
    "pmc_oa": ("pmc_oa", "PmcOa"),
    "pmc_vqa": ("pmc_vqa", "PmcVqa"),
    "radimagenet_vqa": ("radimagenet_vqa", "RadImageNetVqa"),
    "roco": ("roco", "Roco"),
    "roco_v2": ("roco_v2", "RocoV2"),
    "sharegpt4v": ("sharegpt4v", "ShareGpt4V"),
    "slake": ("slake", "Slake"),
    "table": ("table", "Table"),
    "totalsegmentator": ("totalsegmentator", "TotalSegmentator"),
    "vqa_rad": ("vqa_rad", "VqaRad"),
    "webdataset": ("webdataset", "WebDataset"),
}

# Datasets with a separate command: name → module with `main(argv)`, imported on use.
COMMANDS = {"quickstart": "vilam3_jax.quickstart.prepare"}


def names() -> list[str]:
    """Names of all datasets, including those of other packages."""
    return sorted({*DATASETS, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def get(name: str) -> type[Dataset]:
    """The class of a dataset.

    Raises:
      UserError: the name is unknown (the message lists all names), several packages register it, or the class
        cannot be loaded.
    """
    points = list(importlib.metadata.entry_points(group=ENTRY_POINTS, name=name))
    if name in DATASETS and not points:
        module, attribute = DATASETS[name]
        return getattr(importlib.import_module(f"vilam3_jax.datasets.{module}"), attribute)
    if not points:
        raise UserError(f"no dataset {name!r}; there are: {', '.join(names())}")
    packages = [f"{p.dist.name} {p.dist.version}" if p.dist else "an unknown package" for p in points]
    owners = ["vilam3-jax"] * (name in DATASETS) + packages
    if len(owners) > 1:
        raise UserError(f"dataset {name!r}: several packages have one ({', '.join(owners)}); uninstall one")
    label = f"dataset {name!r} of {owners[0]}"
    try:
        found = points[0].load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"{label} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Dataset)):
        raise UserError(f"{label}: {points[0].value} is not a subclass of Dataset")
    return found
