"""CT-RATE: chest CTs with radiologists' reports, and findings extracted from them by a classifier."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import nibabel as nib
import numpy as np

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.phrases import with_article
from vilam3_jax.data.intensity import CT_WINDOWS
from vilam3_jax.data.volumes import describe_volume
from vilam3_jax.datasets.conversations import YES_NO, metadata, question_conversation, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.labelled_scans import AXIS, SliceOptions, file_of, read_scan, slice_records
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.subgroups import age_band, sex_of
from vilam3_jax.errors import InputWarning, UnavailableError, UserError

# In the order of the label files.
FINDINGS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
_COUNTABLE = (
    "Hiatal hernia",
    "Lung nodule",
    "Lung opacity",
    "Mosaic attenuation pattern",
    "Pericardial effusion",
    "Pleural effusion",
    "Pulmonary fibrotic sequela",
)
# Reported as damaged by users.
DAMAGED = {"train_1267_a_4", "train_11755_a_3", "train_11755_a_4"}
VOLUMES = {"train": 47_149, "validation": 3_039}
SCANS = {"train": 24_128, "validation": 1_564}
_PREFIXES = {"train": ("train",), "validation": ("validation", "valid")}
_FOLDERS = {"train": "train", "validation": "valid"}
_VOLUME = re.compile(r"((train|valid)_\d+)_([a-z]+)_\d+")
_ENDING = ".nii.gz"
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_NOT_GIVEN = ("", "not given", "nan")
_REQUESTS = {
    "findings": "Describe the findings of this chest CT.",
    "impression": "What is the impression of this chest CT?",
}
_QUESTIONS = ("Does this chest CT show {name}?", "Is there {name} in this chest CT?")
_MAX_ASKED = 4  # present findings, and as many absent ones but at least one
_MODEL_WINDOW = "model"


@dataclasses.dataclass(frozen=True)
class _Correction:
    """Correct header values of a volume whose own header is wrong, from the metadata."""

    slope: float  # HU = slope * value + intercept
    intercept: float
    codes: str  # orientation of the axes, such as "LPS"

    def window(self, window: tuple[float, float] | None) -> tuple[float, float]:
        """Converts a window from HU to stored values; None is soft tissue."""
        centre, width = window or CT_WINDOWS["soft_tissue"][0]
        return (centre - self.intercept) / self.slope, width / self.slope


@dataclasses.dataclass(frozen=True)
class _Volume:
    row: str  # name in messages, such as "train_reports.csv row 7"
    name: str  # without extension
    path: str  # below the source folder
    findings: str
    impression: str
    labels: Mapping[str, bool]  # predictions of the classifier
    sex: str = ""
    age: str = ""
    weight: float = 1.0  # 1 / number of usable volumes of the scan, if all become records
    correction: _Correction | None = None
    problem: str = ""  # reason to skip the volume


Windows = Mapping[str, tuple[float, float] | None]  # name → (centre, width) in HU; None for the model's own


class CtRate(Dataset):
    """Volumes with reports, volumes with questions about 18 findings, or studies of slices.

    The volumes of a scan share its report, so one is drawn per scan. With `--reconstructions all` each volume
    becomes a record with `meta.weight` = 1 / number of volumes. Head scans (`no_chest` lists) and damaged
    volumes are skipped. The variant "findings" asks about up to four present findings and as many absent
    ones. "validation" is the source's only held-out set. Volumes of the first release need rescaling: their
    windows are converted to stored values using the metadata, and they are skipped if orientation in header
    and metadata differ.
    """

    name = "ct_rate"
    description = "50,188 chest CT volumes of 21,304 patients with reports and 18 labels."
    homepage = "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE"
    citation = "Hamamci et al., arXiv:2403.17834, 2024"
    licence = "CC-BY-NC-SA-4.0"
    access = "registered"
    instructions = (
        "Accept the terms at https://huggingface.co/datasets/ibrahimhamamci/CT-RATE and download "
        "dataset/radiology_text_reports, dataset/multi_abnormality_labels, dataset/metadata and the volumes "
        "of dataset/train_fixed or dataset/valid_fixed (rather than dataset/train and dataset/valid, whose "
        "headers are wrong). The source folder holds dataset/."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "volumes": "whole volumes with the findings and the impression of their reports",
        "findings": "whole volumes with questions about 18 findings, extracted from reports by a classifier",
        "slices": "studies of axial slices, for dialogues from experts' annotations",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--reconstructions",
            choices=("one", "all"),
            default="one",
            help="one random volume per scan, or all of them (default: one)",
        )
        parser.add_argument(
            "--windows",
            default=_MODEL_WINDOW,
            metavar="NAME,...",
            help="display windows, one image each: the model's own "
            f"({_MODEL_WINDOW}), {', '.join(_presets())} (default: {_MODEL_WINDOW})",
        )
        parser.add_argument("--slices", type=int, default=16, help="maximum slices of a volume (default: 16)")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Returns train and validation if their volumes were downloaded."""
        slices, windows = SliceOptions(self.options.slices), _windows(self.options.windows)
        (reports,) = source.require(["dataset/radiology_text_reports", "radiology_text_reports"])
        base = reports.removesuffix("radiology_text_reports")
        folders, fixed = _volume_folders(source, base, self.instructions)
        if not fixed and self.config == "slices":
            raise UserError(
                f"{source.root}: experts cannot read volumes with wrong headers; download the `_fixed` "
                "folders for the variant slices"
            )
        one = self.options.reconstructions == "one"
        splits = {}
        for split, folder in folders.items():
            labelled = self.config == "findings"
            volumes = _volumes(source, base, split, folder, fixed=fixed, labelled=labelled)
            items = _by_scan(volumes) if one else [(volume,) for volume in _weighted(volumes)]
            expected = (SCANS if one else VOLUMES)[split]
            per_item = slices.slices if self.config == "slices" else 1
            make = functools.partial(_make_scan, slices=slices, windows=windows)
            splits[split] = Split(items, make, _name_of, expected, per_item)
        return splits


def _make_scan(
    volumes: Sequence[_Volume], context: Context, slices: SliceOptions, windows: Windows
) -> Iterator[Example | Skipped]:
    """Yields the records of the first usable volume, in random order."""
    order = list(volumes)
    context.rng("reconstruction", order[0].name.rpartition("_")[0]).shuffle(order)
    for position, volume in enumerate(order):
        try:
            yield from _records(volume, context, slices, windows)
            return
        except UnavailableError:
            raise
        except (SkipItem, UserError) as reason:
            if position == len(order) - 1:
                raise SkipItem(str(reason)) from None


def _records(volume: _Volume, context: Context, slices: SliceOptions, windows: Windows) -> Iterator[Example]:
    if volume.problem:
        raise SkipItem(volume.problem)
    texts = {"findings": _section(volume.findings), "impression": _section(volume.impression)}
    if context.config == "volumes" and not any(texts.values()):
        raise SkipItem("its report has neither findings nor impression")
    if volume.correction is not None:
        header = describe_volume(file_of(context, volume.path))
        codes = "".join(nib.orientations.aff2axcodes(header.affine))
        if codes != volume.correction.codes:
            raise SkipItem(
                f"its header has the axes {codes}, its metadata {volume.correction.codes}; download the "
                "volume from the `_fixed` folder"
            )
    scan = read_scan(context, volume.name, [("", volume.path)], "CT")
    patient, _, letter = volume.name.rpartition("_")[0].rpartition("_")
    facts: dict[str, Any] = {
        "patient": patient,
        "scan": context.patient(f"{patient}_{letter}"),
        "weight": volume.weight if volume.weight < 1 else None,
        "sex": sex_of(volume.sex),
        "age_band": age_band(volume.age),
        "findings": sorted(name for name, present in volume.labels.items() if present) or None,
    }
    if context.config == "slices":
        yield from slice_records(context, scan, [], slices, facts)
        return
    if context.config == "findings":
        questions = _label_questions(volume.labels, context.rng(volume.name))
    else:
        questions = [
            question_meta(_REQUESTS[section], text, section, label_source="radiologist")
            for section, text in texts.items()
            if text
        ]
    meta = metadata(context, modality="CT", label_source=questions[0]["label_source"], **facts)
    meta["input_key"] = scan.keys[0]
    if len(windows) > 1:
        meta["windows"] = list(windows)
    convert = volume.correction.window if volume.correction else lambda window: window
    images = [
        context.volume(volume.path, axis=AXIS, window=convert(window), modality="CT")
        for window in windows.values()
    ]
    yield question_conversation(scan.name, images, meta, questions)


def _label_questions(labels: Mapping[str, bool], rng: random.Random) -> list[dict[str, Any]]:
    present = [name for name in FINDINGS if labels.get(name) is True]
    absent = [name for name in FINDINGS if labels.get(name) is False]
    present = rng.sample(present, min(_MAX_ASKED, len(present)))
    absent = rng.sample(absent, min(max(1, len(present)), len(absent)))
    answers = [(name, YES_NO[0]) for name in present] + [(name, YES_NO[1]) for name in absent]
    if not answers:
        raise SkipItem("has no label with a value")
    rng.shuffle(answers)
    questions = []
    for name, answer in answers:
        phrase = with_article(name.lower()) if name in _COUNTABLE else name.lower()
        question = rng.choice(_QUESTIONS).format(name=phrase)
        questions.append(question_meta(question, answer, "finding", options=YES_NO, label_source="labeler"))
    return questions


def _section(text: str) -> str:
    """Returns a section of a report on one line; "" if it is not given."""
    words = " ".join(text.split())
    return "" if words.lower().rstrip(".") in _NOT_GIVEN else text_of(words, "report")


def _presets() -> dict[str, tuple[float, float]]:
    """Returns the presets of a single window."""
    return {name: windows[0] for name, windows in CT_WINDOWS.items() if len(windows) == 1}


def _windows(text: str) -> Windows:
    known: Windows = {_MODEL_WINDOW: None, **_presets()}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--windows: {unknown[0]!r} is none of {', '.join(known)}")
    return {name: known[name] for name in names}


def _volume_folders(source: SourceFolder, base: str, instructions: str) -> tuple[dict[str, str], bool]:
    """Returns (split → existing folder of its volumes, whether their headers are fixed)."""
    fixed = {split: found for split, n in _FOLDERS.items() if (found := source.find(f"{base}{n}_fixed"))}
    raw = {split: found for split, n in _FOLDERS.items() if (found := source.find(f"{base}{n}"))}
    if raw and fixed:
        raise UserError(
            f"{source.root}: has {', '.join(raw.values())} and {', '.join(fixed.values())}; values in HU and "
            "values to be rescaled must not be mixed: move the folders without `_fixed` away"
        )
    if not raw and not fixed:
        wanted = " or ".join(f"{base}{name}_fixed" for name in _FOLDERS.values())
        raise UserError(f"{source.root}: no folder {wanted}. {instructions}")
    return fixed or raw, bool(fixed)


def _volumes(
    source: SourceFolder, base: str, split: str, folder: str, *, fixed: bool, labelled: bool
) -> list[_Volume]:
    """Joins the tables of a split; labels and metadata are optional unless needed."""

    def named(kind: str, stem: str) -> list[str]:
        return [f"{base}{kind}/{prefix}_{stem}" for prefix in _PREFIXES[split]]

    reports = named("radiology_text_reports", "reports.csv")
    predicted = named("multi_abnormality_labels", "predicted_labels.csv")
    about = named("metadata", "metadata.csv")
    table, *_ = source.require(reports, *([predicted] if labelled else []), *([] if fixed else [about]))
    file = source.find(*about)
    labels, people = _labels(source, source.find(*predicted)), _people(source, file)
    corrections = {} if fixed else _corrections(source, file or "")
    heads = _no_chest(source, [f"{base}metadata/no_chest_{prefix}.txt" for prefix in _PREFIXES[split]])
    columns = {"name": ["VolumeName"], "findings": ["Findings_EN"], "impression": ["Impressions_EN"]}
    found, seen = [], set()
    for number, row in enumerate(source.table(table, columns), 1):
        name = row["name"].strip().removesuffix(_ENDING)
        parts = _VOLUME.fullmatch(name)
        problem = ""
        if parts is None or parts[2] != _FOLDERS[split]:
            problem, name = f"its VolumeName is not {_FOLDERS[split]}_NUMBER_LETTER_NUMBER", ""
        elif name in seen:
            problem = "its volume is a duplicate"
        elif name in DAMAGED:
            problem = "its volume is known to be damaged"
        elif name in heads:
            problem = "shows no chest, by the source's list"
        elif not fixed and name not in corrections:
            problem = "the metadata do not correct its wrong header"
        seen.add(name)
        path = f"{folder}/{parts[1]}/{parts[1]}_{parts[3]}/{name}{_ENDING}" if parts and name else ""
        found.append(
            _Volume(
                f"{table.rpartition('/')[2]} row {number}",
                name,
                path,
                row["findings"],
                row["impression"],
                labels.get(name, {}),
                *people.get(name, ("", "")),
                correction=corrections.get(name),
                problem=problem,
            )
        )
    return found


def _weighted(volumes: Sequence[_Volume]) -> list[_Volume]:
    usable = collections.Counter(_scan_of(v) for v in volumes if not v.problem)
    return [v if v.problem else dataclasses.replace(v, weight=1 / usable[_scan_of(v)]) for v in volumes]


def _by_scan(volumes: Sequence[_Volume]) -> list[tuple[_Volume, ...]]:
    """Groups volumes by scan; unusable ones are kept only if their scan has no other."""
    scans: dict[str, list[_Volume]] = {}
    for volume in volumes:
        scans.setdefault(_scan_of(volume) or volume.row, []).append(volume)  # rows without a name stay alone
    return [tuple([v for v in found if not v.problem] or found[:1]) for found in scans.values()]


def _scan_of(volume: _Volume) -> str:
    return volume.name.rpartition("_")[0]


def _labels(source: SourceFolder, file: str | None) -> dict[str, dict[str, bool]]:
    if file is None:
        return {}
    columns = {"VolumeName": ["VolumeName"], **{name: [name] for name in FINDINGS}}
    values = {"0": False, "0.0": False, "1": True, "1.0": True}
    return {
        row["VolumeName"].strip().removesuffix(_ENDING): {
            name: values[row[name].strip()] for name in FINDINGS if row[name].strip() in values
        }
        for row in source.table(file, columns)
    }


def _people(source: SourceFolder, file: str | None) -> dict[str, tuple[str, str]]:
    if file is None:
        return {}
    optional = {"sex": ["PatientSex"], "age": ["PatientAge"]}
    rows = source.table(file, {"name": ["VolumeName"]}, optional=optional)
    return {
        row["name"].strip().removesuffix(_ENDING): (row.get("sex", ""), row.get("age", "")) for row in rows
    }


def _corrections(source: SourceFolder, file: str) -> dict[str, _Correction]:
    """Reads the correct header values of volumes; incomplete rows are ignored."""
    columns = {
        "name": ["VolumeName"],
        "slope": ["RescaleSlope"],
        "intercept": ["RescaleIntercept"],
        "axes": ["ImageOrientationPatient"],
    }
    found = {}
    for row in source.table(file, columns):
        axes = [float(number) for number in _NUMBER.findall(row["axes"])]
        values = [float(n) for key in ("slope", "intercept") for n in _NUMBER.findall(row[key])[:1]]
        if len(axes) != 6 or len(values) != 2 or values[0] <= 0:
            continue
        first, second = np.array(axes[:3]), np.array(axes[3:])
        # DICOM metadata are in LPS, NIfTI is in RAS.
        rotation = np.diag([-1, -1, 1]) @ np.stack([first, second, np.cross(first, second)], axis=1)
        if abs(np.linalg.det(rotation)) < 0.5:
            continue
        affine = np.eye(4)
        affine[:3, :3] = rotation
        codes = "".join(nib.orientations.aff2axcodes(affine))
        found[row["name"].strip().removesuffix(_ENDING)] = _Correction(values[0], values[1], codes)
    return found


def _no_chest(source: SourceFolder, files: Sequence[str]) -> frozenset[str]:
    """Reads the names of volumes that show no chest; some lines are paths."""
    file = source.find(*files)
    if file is None:
        warnings.warn(
            f"{source.root}: no {files[-1]}, so head scans are not excluded; download dataset/metadata",
            InputWarning,
            stacklevel=2,
        )
        return frozenset()
    lines = source.lines(file)
    return frozenset(line.replace("\\", "/").rpartition("/")[2].removesuffix(_ENDING) for line in lines)


def _name_of(volumes: Sequence[_Volume]) -> str:
    return volumes[0].row
