"""Medical Segmentation Decathlon: CT of liver, pancreas and spleen, with label maps."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.labelled_scans import (
    Scan,
    SliceOptions,
    Structure,
    held_names,
    read_labels,
    read_scan,
    slice_records,
    structure,
)
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_ENDINGS = (".nii.gz", ".nii")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of the decathlon.

    Attributes:
      folder: as its archive has it.
      organ: of label 1; label 2, where there is one, is a lesion inside of it.
      lesion: name of label 2, as the experts' tables have it; "" for none.
      train: number of training cases.
      test: number of cases without labels.
      md5: of the archive.
    """

    folder: str
    organ: str
    lesion: str
    train: int
    test: int
    md5: str


TASKS = {
    "task03_liver": Task(
        "Task03_Liver", "liver", "hepatic tumor", 131, 70, "a90ec6c4aa7f6a3d087205e23d4e6397"
    ),
    "task07_pancreas": Task(
        "Task07_Pancreas", "pancreas", "pancreatic tumor", 281, 139, "4f7080cfca169fa8066d17ce6eb061e4"
    ),
    "task09_spleen": Task("Task09_Spleen", "spleen", "", 41, 20, "410d4a301da4e5b2f6f86ec3ddba524e"),
}
_LESION_WORDS = ("cancer", "tumor", "tumour")


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of `dataset.json`.

    Attributes:
      row: names it, such as "training row 7".
      folder: of the task, below the source folder.
      image, label: as the row states them; the label is None of a test case.
      problem: why the row cannot be used, "" if it can.
    """

    row: str
    folder: str
    image: Any
    label: Any = None
    problem: str = ""


class MSD(Dataset):
    """Studies of CT slices of one task, or questions about them.

    Choices of ours: the decathlon has no validation split, so there is one only with `--validation SHARE`, by
    case. Voxels of a lesion count as the organ, too. A lesion is asked for on every slice, the number of
    lesions (26-connected, at least 0.1 ml each) once a scan. Which slices VILA-M3 took was never released.
    """

    name = "msd"
    description = "Abdominal CT with label maps: liver, pancreas and spleen tasks of the decathlon."
    homepage = "http://medicaldecathlon.com"
    citation = "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022)"
    licence = "CC-BY-SA-4.0"
    instructions = (
        "Fetch TASK.tar, such as Task03_Liver.tar, from "
        "https://msd-for-monai.s3-us-west-2.amazonaws.com/ and unpack it, so that the source folder holds "
        "TASK/dataset.json, TASK/imagesTr, TASK/labelsTr and TASK/imagesTs. md5 of the archives: "
        + ", ".join(f"{task.folder}.tar {task.md5}" for task in TASKS.values())
        + "."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "task03_liver": "liver and hepatic tumors (131 cases with labels, 70 without)",
        "task07_pancreas": "pancreas and pancreatic tumors (281 cases with labels, 139 without)",
        "task09_spleen": "spleen (41 cases with labels, 20 without)",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--validation` and the options of slices."""
        SliceOptions.add_arguments(parser)
        parser.add_argument(
            "--validation",
            type=float,
            default=0.0,
            metavar="SHARE",
            help="share of the labelled cases that go to a split `validation` of our own (default: 0)",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Training cases, and as `test` the cases without labels (of studies only)."""
        task, options = TASKS[self.config], SliceOptions.of(self.options)
        share = self.options.validation
        if not 0 <= share < 1:
            raise UserError(f"--validation {share}: must be at least 0 and below 1")
        (listed,) = source.require([f"{task.folder}/dataset.json", "dataset.json"])
        folder = os.path.dirname(listed)
        source.require(*(os.path.join(folder, name) for name in ("imagesTr", "labelsTr")))
        content = source.json(listed)
        if not isinstance(content, dict):
            raise UserError(f"{source.root / listed}: holds no object; unpack the archive again")
        _check_labels(content.get("labels"), task, f"{source.root / listed}")
        seen: set[str] = set()
        training = _cases(source.json_list(listed, "training"), "training", folder, seen)
        names = [stem_of(case.image) for case in training if not case.problem]
        chosen = held_names(names, share, self.name)
        train, validation = [], []
        for case in training:
            held = not case.problem and stem_of(case.image) in chosen
            (validation if held else train).append(case)
        make = functools.partial(make_case, options=options)
        per_item = options.slices
        made = {"train": Split(train, make, _name_of, None if share else task.train, per_item)}
        if share:
            made["validation"] = Split(validation, make, _name_of, None, per_item)
        if not options.questions and "test" in content:
            test = _cases(source.json_list(listed, "test"), "test", folder, seen)
            made["test"] = Split(test, make, _name_of, task.test, per_item)
        return made


def stem_of(path: str) -> str:
    """The file's name without its ending: the case's name."""
    name = os.path.basename(path.replace("\\", "/"))
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def make_case(case: Case, context: Context, options: SliceOptions) -> Iterator[Example | Skipped]:
    """The records of one case.

    Raises:
      SkipItem: the row or a file of it cannot be used.
    """
    if case.problem:
        raise SkipItem(case.problem)
    task, name = TASKS[context.config], stem_of(case.image)
    scan = read_scan(context, name, [("", os.path.join(case.folder, case.image))], "CT")
    structures: list[Structure] = []
    if case.label is not None:
        structures = _structures(context, os.path.join(case.folder, case.label), scan, task)
    yield from slice_records(context, scan, structures, options, {"patient": name})


def _structures(context: Context, path: str, scan: Scan, task: Task) -> list[Structure]:
    labels = read_labels(context, path, scan)
    highest = 2 if task.lesion else 1
    if int(labels.max()) > highest:
        raise SkipItem(f"its label map holds label {int(labels.max())}; {task.folder} has 0 to {highest}")
    found = [structure(task.organ, labels > 0, scan)]
    if task.lesion:
        found.append(structure(task.lesion, labels == 2, scan, "lesion", counted=True))
    return found


def _check_labels(stated: Any, task: Task, file: str) -> None:
    """Raises `UserError` where the file's label names are not those of the task."""
    names = stated if isinstance(stated, dict) else {}
    one, two = (str(names.get(key, "")).strip().lower() for key in ("1", "2"))
    if one == task.organ and (two in _LESION_WORDS if task.lesion else not two):
        return
    wanted = f"1 {task.organ}" + (", 2 cancer" if task.lesion else "")
    raise UserError(f"{file}: its labels are not those of {task.folder} ({wanted}); fetch that task")


def _cases(rows: Sequence[Any], split: str, folder: str, seen: set[str]) -> list[Case]:
    """Cases of rows; adds their names to `seen`, as a name that was seen before is a problem."""
    cases = []
    for number, row in enumerate(rows, 1):
        # Test rows are plain paths in the released files, objects in files that other tools rewrote.
        stated = row if isinstance(row, dict) else {"image": row if split == "test" else None}
        image, label = stated.get("image"), stated.get("label") if split == "training" else None
        problem = _problem(image, "image") or (_problem(label, "label") if split == "training" else "")
        if not problem:
            stem = stem_of(str(image))
            problem = "its case stands in the lists before" if stem in seen else ""
            seen.add(stem)
        cases.append(Case(f"{split} row {number}", folder, image, label, problem))
    return cases


def _problem(path: Any, what: str) -> str:
    if not isinstance(path, str) or not path.strip():
        return f"states no {what} file"
    if os.path.basename(path).startswith("._"):
        return f"its {what} is an AppleDouble file, which holds no {what}"
    return ""


def _name_of(case: Case) -> str:
    return case.row
