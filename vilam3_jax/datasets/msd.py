"""Medical Segmentation Decathlon: CT of liver, pancreas and spleen, with label maps."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import labelled_scans
from vilam3_jax.datasets.dataset import Context, SkipItem, Skipped, Split
from vilam3_jax.datasets.labelled_scans import LabelledScans, Scan, SliceOptions, Structure, structure
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_ENDINGS = (".nii.gz", ".nii")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the decathlon."""

    folder: str  # of the unpacked archive
    organ: str  # label 1
    lesion: str  # label 2, a lesion in the organ, as in the experts' tables; "" for none
    train: int  # number of training cases
    test: int  # number of cases without labels
    md5: str  # of the archive


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
class _Case:
    row: str  # name in messages, such as "training row 7"
    folder: str  # of the task, below the source folder
    image: Any
    label: Any = None  # None for test cases
    problem: str = ""  # reason to skip the row


class MSD(LabelledScans):
    """Studies of CT slices of one task, or questions about them.

    The decathlon has no validation split; `--validation SHARE` draws one by case. Lesion voxels also count as
    organ. Every slice is asked about its lesion, every scan about the number of lesions (26-connected
    components of at least 0.1 ml). VILA-M3's choice of slices was not released.
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
        super().add_arguments(parser)
        parser.add_argument(
            "--validation",
            type=float,
            default=0.0,
            metavar="SHARE",
            help="share of the labelled cases for a validation split (default: 0)",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Returns train, optionally validation, and as `test` the cases without labels (studies only)."""
        task, share = TASKS[self.config], self.options.validation
        if not 0 <= share < 1:
            raise UserError(f"--validation {share}: must be at least 0 and below 1")
        (listed,) = source.require([f"{task.folder}/dataset.json", "dataset.json"])
        folder = os.path.dirname(listed)
        source.require(*(os.path.join(folder, name) for name in ("imagesTr", "labelsTr")))
        content = source.json(listed)
        if not isinstance(content, dict):
            raise UserError(f"{source.root / listed}: not an object; unpack the archive again")
        _check_labels(content.get("labels"), task, f"{source.root / listed}")
        seen: set[str] = set()
        training = _cases(source.json_list(listed, "training"), "training", folder, seen)
        names = [_stem(case.image) for case in training if not case.problem]
        chosen = labelled_scans.held_names(names, share, self.name)
        train, validation = [], []
        for case in training:
            held = not case.problem and _stem(case.image) in chosen
            (validation if held else train).append(case)
        splits = {"train": self.case_split(train, _make_case, None if share else task.train)}
        if share:
            splits["validation"] = self.case_split(validation, _make_case)
        if not self.slice_options().questions and "test" in content:
            test = _cases(source.json_list(listed, "test"), "test", folder, seen)
            splits["test"] = self.case_split(test, _make_case, task.test)
        return splits


def _stem(path: str) -> str:
    name = os.path.basename(path.replace("\\", "/"))
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def _make_case(case: _Case, context: Context, options: SliceOptions) -> Iterator[Example | Skipped]:
    task, name = TASKS[context.config], _stem(case.image)
    scan = labelled_scans.read_scan(context, name, [("", os.path.join(case.folder, case.image))], "CT")
    structures: list[Structure] = []
    if case.label is not None:
        structures = _structures(context, os.path.join(case.folder, case.label), scan, task)
    yield from labelled_scans.slice_records(context, scan, structures, options, {"patient": name})


def _structures(context: Context, path: str, scan: Scan, task: Task) -> list[Structure]:
    labels = labelled_scans.read_labels(context, path, scan)
    highest = 2 if task.lesion else 1
    if int(labels.max()) > highest:
        raise SkipItem(f"its label map holds label {int(labels.max())}; {task.folder} has 0 to {highest}")
    found = [structure(task.organ, labels > 0, scan)]
    if task.lesion:
        found.append(structure(task.lesion, labels == 2, scan, "lesion", counted=True))
    return found


def _check_labels(stated: Any, task: Task, file: str) -> None:
    """Raises `UserError` if the label names of the file are not those of the task."""
    names = stated if isinstance(stated, dict) else {}
    one, two = (str(names.get(key, "")).strip().lower() for key in ("1", "2"))
    if one == task.organ and (two in _LESION_WORDS if task.lesion else not two):
        return
    wanted = f"1 {task.organ}" + (", 2 cancer" if task.lesion else "")
    raise UserError(f"{file}: its labels are not those of {task.folder} ({wanted}); download that task")


def _cases(rows: Sequence[Any], split: str, folder: str, seen: set[str]) -> list[_Case]:
    """Converts rows to cases, and adds their names to `seen` to detect duplicates."""
    cases = []
    for number, row in enumerate(rows, 1):
        # Test rows are paths in the released files, objects in files rewritten by other tools.
        stated = row if isinstance(row, dict) else {"image": row if split == "test" else None}
        image, label = stated.get("image"), stated.get("label") if split == "training" else None
        problem = _problem(image, "image") or (_problem(label, "label") if split == "training" else "")
        if not problem:
            stem = _stem(str(image))
            problem = "its case is a duplicate" if stem in seen else ""
            seen.add(stem)
        cases.append(_Case(f"{split} row {number}", folder, image, label, problem))
    return cases


def _problem(path: Any, what: str) -> str:
    if not isinstance(path, str) or not path.strip():
        return f"states no {what} file"
    if os.path.basename(path).startswith("._"):
        return f"its {what} is an AppleDouble file, which contains no {what}"
    return ""
