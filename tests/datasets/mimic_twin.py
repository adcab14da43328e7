"""A small synthetic copy of MIMIC-CXR-JPG: tables, folders, invented patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.datasets.twins import picture, write

# Order of the label columns in the release, with "No Finding" in ninth position.
LABELS = [
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture"),
    *("Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia"),
    *("Pneumothorax", "Support Devices"),
]
# (subject, study, dicom, split, ViewPosition, ViewCodeSequence)
FILMS = [
    ("90000001", "80000001", "a1", "train", "PA", "postero-anterior"),
    ("90000001", "80000001", "a2", "train", "LATERAL", "lateral"),
    ("90000001", "80000002", "a3", "train", "", "antero-posterior"),
    ("90000002", "80000003", "b1", "train", "AP", ""),
    ("90000003", "80000004", "c1", "validate", "AP", ""),
    ("91000004", "80000005", "d1", "test", "PA", ""),
    ("91000004", "80000006", "d2", "test", "PA", ""),
]
STUDIES = [
    ("90000001", "80000001", {"Edema": "1.0", "Pneumothorax": "0.0", "Pneumonia": "-1.0"}),
    ("90000001", "80000002", {"No Finding": "1.0", "Support Devices": "1.0"}),
    ("90000002", "80000003", {"Pleural Effusion": "1.0", "Lung Opacity": "1.0", "Edema": "0.0"}),
    ("90000003", "80000004", {"No Finding": "1.0"}),
    ("91000004", "80000005", {"Edema": "1.0"}),
    ("91000004", "80000006", {"Edema": "0.0"}),
]


def path_of(subject: str, study: str, dicom: str) -> str:
    return f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"


def tables(films: list = FILMS, studies: list = STUDIES) -> dict[str, Any]:
    """The tables of the release."""
    metadata = [["StudyDate", "dicom_id", "ViewPosition", "ViewCodeSequence_CodeMeaning", "0018,1400"]]
    metadata += [["21800506", f[2], f[4], f[5], "DX"] for f in films]
    labels = [["subject_id", "study_id", *LABELS]]
    labels += [[p, s, *(values.get(name, "") for name in LABELS)] for p, s, values in studies]
    renamed = ["Airspace Opacity" if name == "Lung Opacity" else name for name in LABELS]
    read = [["study_id", *renamed], ["80000005", *("1.0" if n == "Fracture" else "0.0" for n in LABELS)]]
    return {
        "mimic-cxr-2.0.0-split.csv.gz": [
            ["dicom_id", "study_id", "subject_id", "split"],
            *[[f[2], f[1], f[0], f[3]] for f in films],
        ],
        "mimic-cxr-2.0.0-metadata.csv.gz": metadata,
        "mimic-cxr-2.0.0-chexpert.csv.gz": labels,
        "mimic-cxr-2.1.0-test-set-labeled.csv": read,
    }


def release(folder: Path, films: list = FILMS, changes: dict[str, Any] | None = None) -> Path:
    """Writes tables and images; `changes` replaces files by name, None omits one."""
    pictures = {path_of(*film[:3]): picture(number) for number, film in enumerate(FILMS)}
    files = {**pictures, **tables(films), **(changes or {})}
    return write(folder, {name: content for name, content in files.items() if content is not None})
