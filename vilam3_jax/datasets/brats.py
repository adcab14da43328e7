"""BraTS 2018 and 2021: gliomas in four MRI sequences of one head, with the regions of the tumor marked."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets.conversations import question_meta
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.labelled_scans import (
    Scan,
    SliceOptions,
    Structure,
    read_labels,
    read_scan,
    slice_records,
    structure,
)
from vilam3_jax.datasets.slices import pick
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.subgroups import age_band
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

# The expert's role → how files are named, in the order of VILA-M3's images.
SEQUENCES = {"t1c": "t1ce", "t1": "t1", "t2": "t2", "flair": "flair"}
CORE, EDEMA, ENHANCING = 1, 2, 4
GRADES = {"HGG": "high-grade glioma", "LGG": "low-grade glioma"}
# VILA-M3 divides the 285 cases of 2018 like this.
SHARES = {"train": 200, "validation": 42, "test": 43}
CASES = {"2018": {"HGG": 210, "LGG": 75}, "2021": {"": 1251}}
_FOLDERS = {"2018": ("HGG/Brats18_*", "LGG/Brats18_*"), "2021": ("BraTS2021_*",)}
_NAMES = {"2018": r"Brats18_\w+_\d+", "2021": r"BraTS2021_\d{5}"}
_OTHER_YEARS = ("BraTS19_*", "BraTS20_*", "BraTS-*", "Brats17_*", "BRATS_*", "imagesTr")
_LISTS = {
    "training": "train",
    "validation": "validation",
    "testing": "test",
    "train": "train",
    "test": "test",
}
_ENDINGS = (".nii.gz", ".nii")
_MAX_LIST_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """One head.

    Attributes:
      number: names it in messages, such as "case 7".
      name: the case's name, and of its files' beginnings.
      folder: below the source folder.
      grade: "HGG", "LGG", or "" where the source does not say.
      age: as the source has it.
      problem: why it cannot be used, "" if it can.
    """

    number: str
    name: str
    folder: str
    grade: str = ""
    age: str = ""
    problem: str = ""

    @property
    def patient(self) -> str:
        """The name without the number of the visit, which 2018 has at its end."""
        return re.sub(r"_\d+$", "", self.name) if self.name.startswith("Brats18_") else self.name


class BraTS(Dataset):
    """Studies of slices with four images, or questions about them: tumor, its regions, and in 2018 the grade.

    Choices of ours: the labelled cases are divided by patient, within each grade, in the proportions of
    VILA-M3 (200, 42 and 43 of the 285 cases of 2018); `--datalist` takes its own division. Half of the slices
    show a tumor. The organizers' validation cases have no labels and are left out.

    With `parity`: every image is the T1 with contrast, as VILA-M3's script writes it four times, and slices
    are those with all three labels. Expert results still belong to the four scans.
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
        "MICCAI_BraTS_2018_Data_Training.zip; the source folder holds HGG/Brats18_*/ and LGG/Brats18_*/. "
        "2021: join the challenge at https://www.synapse.org/brats2021 and unpack "
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData.zip; the source folder holds BraTS2021_00000/ and so on. "
        "Each case folder holds CASE_t1.nii.gz, CASE_t1ce.nii.gz, CASE_t2.nii.gz, CASE_flair.nii.gz and "
        "CASE_seg.nii.gz."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "2018": "285 cases with grades, of which VILA-M3 was trained",
        "2021": "1,251 cases without grades",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--datalist` and the options of slices."""
        SliceOptions.add_arguments(parser)
        parser.add_argument(
            "--datalist",
            default="",
            metavar="FILE",
            help='JSON file {"training": [{"image": [path, ...]}], "validation": ..., "testing": ...} that '
            "divides the cases, as VILA-M3's (default: a division of our own)",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Train, validation and test, by patient or as the data list has them."""
        options = SliceOptions.of(self.options)
        cases = _find_cases(source, self.config, self.instructions)
        if self.options.datalist:
            divided, counts = _listed(self.options.datalist, cases, self.config), {}
        else:
            divided, counts = _divided(cases), _official_counts(self.config)
        make = functools.partial(make_case, options=options)
        return {
            split: Split(items, make, _name_of, counts.get(split), options.slices)
            for split, items in divided.items()
        }


def make_case(case: Case, context: Context, options: SliceOptions) -> Iterator[Example | Skipped]:
    """The records of one case.

    Raises:
      SkipItem: a file is missing or cannot be used.
    """
    if case.problem:
        raise SkipItem(case.problem)
    files = [(role, _file(context, case, suffix)) for role, suffix in SEQUENCES.items()]
    scan = read_scan(context, case.name, files, "MR")
    labels = read_labels(context, _file(context, case, "seg"), scan)
    present = set(np.unique(labels).tolist())
    if wrong := present - {0, CORE, EDEMA, ENHANCING}:
        raise SkipItem(f"its label map holds label {min(wrong)}; BraTS 2018 and 2021 have 0, 1, 2 and 4")
    facts = {"patient": case.patient, "grade": case.grade or None, "age_band": age_band(case.age)}
    grade = [_grade_question(case.grade)] if case.grade else []
    indices, shown = None, None
    if context.parity:
        complete = [labels == label for label in (CORE, EDEMA, ENHANCING)]
        planes = np.flatnonzero(np.all([one.any(axis=(0, 1)) for one in complete], axis=0)).tolist()
        indices, shown = pick(planes, options.slices, context.rng(case.name)), [0] * len(files)
    yield from slice_records(
        context,
        scan,
        _structures(labels, scan),
        options,
        facts,
        indices=indices,
        shown=shown,
        on_lesions=grade,
    )


def _structures(labels: np.ndarray, scan: Scan) -> list[Structure]:
    """The tumor and its regions. The parts of one glioma are not several tumors, so nothing is counted."""
    return [
        structure("brain tumor", labels > 0, scan, "lesion"),
        structure("peritumoral edema", labels == EDEMA, scan, "part"),
        structure("enhancing tumor", labels == ENHANCING, scan, "part"),
    ]


def _grade_question(grade: str) -> dict[str, Any]:
    return question_meta(
        "Which grade does the glioma have?", GRADES[grade], "grade", options=tuple(GRADES.values())
    )


def _file(context: Context, case: Case, suffix: str) -> str:
    """The file of a sequence. Some copies hold a folder of the file's name, with the file in it.

    Raises:
      SkipItem: there is none, or the folder holds several.
    """
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


def _find_cases(source: SourceFolder, year: str, instructions: str) -> list[Case]:
    """All cases with labels, by name; the folders may lie one folder deeper.

    Raises:
      UserError: there are none, or two of one name.
    """
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
                    f"{source.root}: {os.path.basename(found[0])} is of another challenge than BraTS {year}, "
                    "with other names or labels; fetch that one"
                )
        raise UserError(f"{source.root}: no folder {' or '.join(_FOLDERS[year])}. {instructions}")
    ages = _ages(source, year)
    by_name: dict[str, str] = {}
    for path in folders:
        name = os.path.basename(path)
        if name in by_name:
            raise UserError(f"{source.root}: {by_name[name]} and {path} are one case; keep one copy")
        by_name[name] = path
    return [
        Case(f"case {number}", name, path, _grade_of(path) if year == "2018" else "", ages.get(name, ""))
        for number, (name, path) in enumerate(sorted(by_name.items()), 1)
    ]


def _grade_of(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def _ages(source: SourceFolder, year: str) -> dict[str, str]:
    """Case → age, of `survival_data.csv`, which 2018 has for some cases."""
    if year != "2018":
        return {}
    tables = [*source.glob("survival_data.csv"), *source.glob("*/survival_data.csv")]
    columns = {"name": ["BraTS18ID", "Brats18ID"], "age": ["Age"]}
    rows = (row for table in tables for row in source.table(table, {}, optional=columns))
    return {row["name"].strip(): row["age"] for row in rows if "name" in row and "age" in row}


def _cuts(count: int) -> tuple[int, int]:
    """Where validation and test begin among `count` patients."""
    whole = sum(SHARES.values())
    return round(count * SHARES["train"] / whole), round(count * (whole - SHARES["test"]) / whole)


def _divided(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Divides cases by patient, within each grade, in an order that depends on the patients' names alone."""
    found: dict[str, list[Case]] = {split: [] for split in SHARES}
    for grade in sorted({case.grade for case in cases}):
        members = [case for case in cases if case.grade == grade]
        patients = sorted({case.patient for case in members}, key=_digest)
        first, second = _cuts(len(patients))
        place = {patient: number for number, patient in enumerate(patients)}
        for case in members:
            number = place[case.patient]
            found["train" if number < first else "validation" if number < second else "test"].append(case)
    return found


def _digest(patient: str) -> str:
    return hashlib.sha256(f"brats/{patient}".encode()).hexdigest()


def _official_counts(year: str) -> dict[str, int]:
    counts = dict.fromkeys(SHARES, 0)
    for count in CASES[year].values():
        first, second = _cuts(count)
        counts["train"] += first
        counts["validation"] += second - first
        counts["test"] += count - second
    return counts


def _listed(file: str, cases: Sequence[Case], year: str) -> dict[str, list[Case]]:
    """Divides cases as a data list does; cases that it does not name are left out.

    Raises:
      UserError: no such list, or it puts a patient into two splits.
    """
    try:
        content = json.loads(paths.read_bytes(file, _MAX_LIST_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--datalist {file}: is no JSON ({str(error)[:100]}); fetch it again") from error
    lists = {key: content[key] for key in _LISTS if key in content} if isinstance(content, dict) else {}
    if not lists or not all(isinstance(rows, list) for rows in lists.values()):
        raise UserError(f"--datalist {file}: holds no lists training, validation and testing; correct it")
    known = {case.name: case for case in cases}
    found: dict[str, list[Case]] = {split: [] for split in SHARES}
    split_of: dict[str, str] = {}
    seen: set[str] = set()
    for key, number, row in ((key, n, row) for key, rows in lists.items() for n, row in enumerate(rows, 1)):
        split, place, name = _LISTS[key], f"{key} row {number}", _case_named(row, year)
        if name is None:
            case = Case(place, "", "", problem=f"names no case of BraTS {year}")
        elif name not in known:
            case = Case(place, name, "", problem="its case has no folder")
        else:
            again = "its case stands in the list before" if name in seen else ""
            case = dataclasses.replace(known[name], number=place, problem=again)
        if name and split_of.setdefault(case.patient, split) != split:
            raise UserError(
                f"--datalist {file}: the patient of {place} is in {split_of[case.patient]}, too; correct it"
            )
        seen.add(case.name)
        found[split].append(case)
    return found


def _case_named(row: Any, year: str) -> str | None:
    """The case of a row: the folder of its first image, wherever the list's paths begin."""
    images = row.get("image") if isinstance(row, dict) else row
    first = images[0] if isinstance(images, list) and images else images
    parts = first.replace("\\", "/").split("/") if isinstance(first, str) else []
    return next((part for part in reversed(parts) if re.fullmatch(_NAMES[year], part)), None)


def _name_of(case: Case) -> str:
    return case.number
