"""BraTS 2018 and 2021: gliomas in four MRI sequences, with segmented tumor regions."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import labelled_scans, user_data
from vilam3_jax.datasets.conversations import question_meta
from vilam3_jax.datasets.dataset import Context, SkipItem, Skipped, Split
from vilam3_jax.datasets.labelled_scans import LabelledScans, SliceOptions, structure
from vilam3_jax.datasets.slices import pick
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.subgroups import age_band
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

# Role of the expert's input → file suffix, in the order of VILA-M3's images.
SEQUENCES = {"t1c": "t1ce", "t1": "t1", "t2": "t2", "flair": "flair"}
CORE, EDEMA, ENHANCING = 1, 2, 4
GRADES = {"HGG": "high-grade glioma", "LGG": "low-grade glioma"}
# VILA-M3's split of the 285 cases of 2018.
SHARES = {"train": 200, "validation": 42, "test": 43}
CASES = {"2018": {"HGG": 210, "LGG": 75}, "2021": {"": 1251}}
_FOLDERS = {"2018": ("HGG/Brats18_*", "LGG/Brats18_*"), "2021": ("BraTS2021_*",)}
_NAMES = {"2018": r"Brats18_\w+_\d+", "2021": r"BraTS2021_\d{5}"}
_OTHER_YEARS = ("BraTS19_*", "BraTS20_*", "BraTS-*", "Brats17_*", "BRATS_*", "imagesTr")
_LISTS = ("training", "validation", "testing", "train", "test")
_ENDINGS = (".nii.gz", ".nii")


@dataclasses.dataclass(frozen=True)
class _Case:
    row: str  # name in messages, such as "case 7"
    name: str  # also the prefix of its files
    folder: str  # below the source folder
    grade: str = ""  # "HGG", "LGG", or "" if unknown
    age: str = ""
    problem: str = ""  # reason to skip the case

    @property
    def patient(self) -> str:
        """The name without the visit number that 2018 appends."""
        return re.sub(r"_\d+$", "", self.name) if self.name.startswith("Brats18_") else self.name


class BraTS(LabelledScans):
    """Studies of slices with four images, or questions about the tumor, its regions and (2018) its grade.

    Labelled cases are split by patient, within each grade, in VILA-M3's proportions (200, 42 and 43 of the
    285 cases of 2018), or as in `--datalist`. Half of the slices show a tumor. The organizers' validation
    cases have no labels and are excluded.

    `parity`: all four images are the T1 with contrast, as written by VILA-M3's script, and slices are those
    with all three labels. Expert results still refer to the four scans.
    """

    has_parity = True
    name = "brats"
    description = "Gliomas in T1 with contrast, T1, T2 and FLAIR, co-registered and skull-stripped."
    homepage = "https://www.med.upenn.edu/cbica/brats/"
    citation = (
        "Menze et al., IEEE TMI 34(10), 2015; Bakas et al., Scientific Data 4, 170117, 2017; "
        "Baid et al., arXiv:2107.02314, 2021"
    )
    licence = "unverified"
    access = "registered"
    instructions = (
        "2018: register at CBICA (https://www.med.upenn.edu/sbia/brats2018/registration.html) and unpack "
        "MICCAI_BraTS_2018_Data_Training.zip; the source folder contains HGG/Brats18_*/ and LGG/Brats18_*/. "
        "2021: join the challenge at https://www.synapse.org/brats2021 and unpack "
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData.zip; the source folder contains BraTS2021_00000/ and so on. "
        "Each case folder contains CASE_t1.nii.gz, CASE_t1ce.nii.gz, CASE_t2.nii.gz, CASE_flair.nii.gz and "
        "CASE_seg.nii.gz."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "2018": "285 cases with grades; VILA-M3's training data",
        "2021": "1,251 cases without grades",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--datalist",
            default="",
            metavar="FILE",
            help='split in VILA-M3\'s format: JSON file {"training": [{"image": [path, ...]}], "validation": '
            '..., "testing": ...} (default: by hash of the patient)',
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        cases = _find_cases(source, self.config, self.instructions)
        if self.options.datalist:
            divided, counts = _listed(self.options.datalist, cases, self.config), {}
        else:
            divided, counts = _divided(cases), _official_counts(self.config)
        return {
            split: self.case_split(items, _make_case, counts.get(split)) for split, items in divided.items()
        }


def _make_case(case: _Case, context: Context, options: SliceOptions) -> Iterator[Example | Skipped]:
    files = [(role, _file(context, case, suffix)) for role, suffix in SEQUENCES.items()]
    scan = labelled_scans.read_scan(context, case.name, files, "MR")
    labels = labelled_scans.read_labels(context, _file(context, case, "seg"), scan)
    present = set(np.unique(labels).tolist())
    if wrong := present - {0, CORE, EDEMA, ENHANCING}:
        raise SkipItem(f"its label map holds label {min(wrong)}; BraTS 2018 and 2021 have 0, 1, 2 and 4")
    structures = [  # parts of one glioma are not separate tumors, so nothing is counted
        structure("brain tumor", labels > 0, scan, "lesion"),
        structure("peritumoral edema", labels == EDEMA, scan, "part"),
        structure("enhancing tumor", labels == ENHANCING, scan, "part"),
    ]
    facts = {"patient": case.patient, "grade": case.grade or None, "age_band": age_band(case.age)}
    question, grades = "Which grade does the glioma have?", tuple(GRADES.values())
    grade = [question_meta(question, GRADES[case.grade], "grade", options=grades)] if case.grade else []
    indices, shown = None, None
    if context.parity:
        complete = [labels == label for label in (CORE, EDEMA, ENHANCING)]
        planes = np.flatnonzero(np.all([one.any(axis=(0, 1)) for one in complete], axis=0)).tolist()
        indices, shown = pick(planes, options.slices, context.rng(case.name)), [0] * len(files)
    yield from labelled_scans.slice_records(
        context, scan, structures, options, facts, indices=indices, shown=shown, on_lesions=grade
    )


def _file(context: Context, case: _Case, suffix: str) -> str:
    """Returns the file of a sequence. In some copies it is the only file of a folder with its name."""
    root = paths.as_path(context.root)
    for ending in _ENDINGS:
        name = f"{case.folder}/{case.name}_{suffix}{ending}"
        if not paths.exists(root / name):
            continue
        if not (root / name).is_dir():
            return name
        inside = [path.name for path in (root / name).iterdir()]
        inside = [one for one in inside if one.endswith(_ENDINGS) and not one.startswith(".")]
        if len(inside) != 1:
            raise SkipItem(f"its folder *_{suffix}{ending} holds {len(inside)} scans instead of one")
        return f"{name}/{inside[0]}"
    raise SkipItem(f"its {suffix} file is missing")


def _find_cases(source: SourceFolder, year: str, instructions: str) -> list[_Case]:
    """Returns the cases with labels by name, up to one folder below the layout of `instructions`."""
    folders = [
        path
        for pattern in _FOLDERS[year]
        for path in (*source.glob(pattern), *source.glob(f"*/{pattern}"))
        if re.fullmatch(_NAMES[year], os.path.basename(path)) and (source.root / path).is_dir()
    ]
    # The organizers' validation cases have no labels.
    folders = [path for path in folders if "validation" not in os.path.dirname(path).lower()]
    if not folders:
        for pattern in (depth + name for name in _OTHER_YEARS for depth in ("", "*/", "*/*/")):
            if found := source.glob(pattern):
                raise UserError(
                    f"{source.root}: {os.path.basename(found[0])} is not from BraTS {year}, which has "
                    "other names or labels; download that challenge"
                )
        raise UserError(f"{source.root}: no folder {' or '.join(_FOLDERS[year])}. {instructions}")
    ages = _ages(source, year)
    by_name: dict[str, str] = {}
    for path in folders:
        name = os.path.basename(path)
        if name in by_name:
            raise UserError(f"{source.root}: {by_name[name]} and {path} are the same case; keep one copy")
        by_name[name] = path
    cases = []
    for number, (name, path) in enumerate(sorted(by_name.items()), 1):
        grade = os.path.basename(os.path.dirname(path)) if year == "2018" else ""
        cases.append(_Case(f"case {number}", name, path, grade, ages.get(name, "")))
    return cases


def _ages(source: SourceFolder, year: str) -> dict[str, str]:
    """Reads case → age from `survival_data.csv`, which exists for some cases of 2018."""
    if year != "2018":
        return {}
    tables = [*source.glob("survival_data.csv"), *source.glob("*/survival_data.csv")]
    columns = {"name": ["BraTS18ID", "Brats18ID"], "age": ["Age"]}
    rows = (row for table in tables for row in source.table(table, {}, optional=columns))
    return {row["name"].strip(): row["age"] for row in rows if "name" in row and "age" in row}


def _cuts(count: int) -> tuple[int, int]:
    """Returns the first validation and test index among `count` patients."""
    whole = sum(SHARES.values())
    return round(count * SHARES["train"] / whole), round(count * (whole - SHARES["test"]) / whole)


def _divided(cases: Sequence[_Case]) -> dict[str, list[_Case]]:
    """Splits cases by patient within each grade, in the order of hashed patient names."""
    found: dict[str, list[_Case]] = {split: [] for split in SHARES}
    for grade in sorted({case.grade for case in cases}):
        members = [case for case in cases if case.grade == grade]
        patients = sorted(
            {case.patient for case in members},
            key=lambda patient: hashlib.sha256(f"brats/{patient}".encode()).hexdigest(),
        )
        first, second = _cuts(len(patients))
        for case in members:
            number = patients.index(case.patient)
            found["train" if number < first else "validation" if number < second else "test"].append(case)
    return found


def _official_counts(year: str) -> dict[str, int]:
    counts = dict.fromkeys(SHARES, 0)
    for count in CASES[year].values():
        first, second = _cuts(count)
        counts["train"] += first
        counts["validation"] += second - first
        counts["test"] += count - second
    return counts


def _listed(file: str, cases: Sequence[_Case], year: str) -> dict[str, list[_Case]]:
    """Splits cases as in a data list; cases that it does not name are excluded."""
    content = user_data.read_json(file)
    lists = {key: content[key] for key in _LISTS if key in content} if isinstance(content, dict) else {}
    if not lists or not all(isinstance(rows, list) for rows in lists.values()):
        raise UserError(
            f"--datalist {file}: must contain the lists training, validation, testing; correct it"
        )
    known = {case.name: case for case in cases}
    found: dict[str, list[_Case]] = {split: [] for split in SHARES}
    split_of: dict[str, str] = {}
    seen: set[str] = set()
    for key, number, row in ((key, n, row) for key, rows in lists.items() for n, row in enumerate(rows, 1)):
        split, place, name = key.removesuffix("ing"), f"{key} row {number}", _case_named(row, year)
        if name is None:
            case = _Case(place, "", "", problem=f"names no case of BraTS {year}")
        elif name not in known:
            case = _Case(place, name, "", problem="its case has no folder")
        else:
            problem = "its case is a duplicate" if name in seen else ""
            case = dataclasses.replace(known[name], row=place, problem=problem)
        if name and split_of.setdefault(case.patient, split) != split:
            raise UserError(
                f"--datalist {file}: the patient of {place} is also in {split_of[case.patient]}; correct it"
            )
        seen.add(case.name)
        found[split].append(case)
    return found


def _case_named(row: Any, year: str) -> str | None:
    """Returns the case of a row: the folder of its first image, whatever the root of the paths."""
    images = row.get("image") if isinstance(row, dict) else row
    first = images[0] if isinstance(images, list) and images else images
    parts = first.replace("\\", "/").split("/") if isinstance(first, str) else []
    return next((part for part in reversed(parts) if re.fullmatch(_NAMES[year], part)), None)
