"""CT-RATE: chest CTs with radiologists' reports and the findings that a classifier read in them."""

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
from etils import epath

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.phrases import with_article
from vilam3_jax.data.intensity import CT_WINDOWS
from vilam3_jax.data.volumes import describe_volume
from vilam3_jax.datasets.conversations import conversation, metadata, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.labelled_scans import AXIS, Scan, SliceOptions, file_of, read_scan, slice_records
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
# Volumes that users found to be damaged.
DAMAGED = {"train_1267_a_4", "train_11755_a_3", "train_11755_a_4"}
VOLUMES = {"train": 47_149, "validation": 3_039}
SCANS = {"train": 24_128, "validation": 1_564}
_PREFIXES = {"train": ("train",), "validation": ("validation", "valid")}
_FOLDERS = {"train": "train", "validation": "valid"}
_VOLUME = re.compile(r"((train|valid)_\d+)_([a-z]+)_\d+")
_ENDING = ".nii.gz"
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_NOT_GIVEN = ("", "not given", "nan")
_FINDINGS_REQUEST = "Describe the findings of this chest CT."
_IMPRESSION_REQUEST = "What is the impression of this chest CT?"
_QUESTIONS = ("Does this chest CT show {name}?", "Is there {name} in this chest CT?")
_YES_NO = ("yes", "no")
_MOST_ASKED = 4  # findings that are there; as many that are not, and at least one
_MODEL_WINDOW = "model"


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the metadata say of a volume whose header is wrong.

    Attributes:
      slope, intercept: HU = slope * value + intercept.
      codes: directions of the file's axes, such as "LPS".
    """

    slope: float
    intercept: float
    codes: str

    def window(self, window: tuple[float, float] | None) -> tuple[float, float]:
        """A window in the file's values; None stands for that of soft tissue."""
        centre, width = window or CT_WINDOWS["soft_tissue"][0]
        return (centre - self.intercept) / self.slope, width / self.slope


@dataclasses.dataclass(frozen=True)
class Volume:
    """A row of the reports.

    Attributes:
      row: names it, such as "train_reports.csv row 7".
      name: of the volume, without its ending.
      path: below the source folder.
      findings, impression: sections of the report, as the row has them.
      labels: finding → whether the classifier read it; those without a value are left out.
      sex, age: as the metadata have them.
      weight: 1 over the number of usable volumes of the scan, where all of them become records.
      stored: how the file's values and axes differ from what they should be; None: they do not.
      problem: why it cannot be used, "" if it can.
    """

    row: str
    name: str
    path: str
    findings: str
    impression: str
    labels: Mapping[str, bool]
    sex: str = ""
    age: str = ""
    weight: float = 1.0
    stored: Stored | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Making:
    """How volumes become records.

    Attributes:
      slices: of the variant "slices".
      windows: name → (centre, width) in HU of each image; None: the model's own.
    """

    slices: SliceOptions
    windows: Mapping[str, tuple[float, float] | None]


class CtRate(Dataset):
    """Volumes with reports, volumes with questions about 18 findings, or studies of slices.

    Choices of ours: all volumes of a scan share its report, so each scan counts once: one of its volumes is
    drawn. With `--reconstructions all` each volume is a record and `meta.weight` is 1 over their number. Head
    scans (the `no_chest` lists) and volumes that are known to be damaged are skipped. The variant
    "findings" asks for up to four findings that are there and as many that are not. The split "validation" is
    the source's only held-out set. Volumes as they were first released hold values that are still to be
    rescaled: their windows are given in these values, by the metadata; one whose header puts the patient
    another way round than the metadata is skipped.
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
        "findings": "whole volumes with questions about 18 findings that a classifier read in the reports",
        "slices": "studies of axial slices, for dialogues from experts' annotations",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares which volumes of a scan are taken and how they are shown."""
        parser.add_argument(
            "--reconstructions",
            choices=("one", "all"),
            default="one",
            help="one volume of each scan, drawn by the seed, or all of them (default: one)",
        )
        parser.add_argument(
            "--windows",
            default=_MODEL_WINDOW,
            metavar="NAME,...",
            help="how the volume is shown, an image for each: the model's own window "
            f"({_MODEL_WINDOW}), {', '.join(_presets())} (default: {_MODEL_WINDOW})",
        )
        parser.add_argument("--slices", type=int, default=16, help="most slices of a volume (default: 16)")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Train and validation, as far as their volumes are there."""
        making = Making(SliceOptions(self._slices()), _windows(self.options.windows))
        (reports,) = source.require(["dataset/radiology_text_reports", "radiology_text_reports"])
        base = reports.removesuffix("radiology_text_reports")
        folders, fixed = _volume_folders(source, base, self.instructions)
        if not fixed and self.config == "slices":
            raise UserError(
                f"{source.root}: experts cannot read volumes with wrong headers; download the folders with "
                "`_fixed` for the variant slices"
            )
        one = self.options.reconstructions == "one"
        made = {}
        for split, folder in folders.items():
            tables = _Tables.read(source, base, split, fixed=fixed, labelled=self.config == "findings")
            volumes = _volumes(source, tables, split, folder)
            items = _by_scan(volumes) if one else [(volume,) for volume in _weighted(volumes)]
            expected = (SCANS if one else VOLUMES)[split]
            per_item = making.slices.slices if self.config == "slices" else 1
            make = functools.partial(make_scan, making=making)
            made[split] = Split(items, make, _name_of, expected, per_item)
        return made

    def _slices(self) -> int:
        if self.options.slices < 1:
            raise UserError(f"--slices {self.options.slices}: must be at least 1")
        return self.options.slices


def make_scan(volumes: Sequence[Volume], context: Context, making: Making) -> Iterator[Example | Skipped]:
    """The records of the first of these volumes, in a drawn order, that can be used.

    Raises:
      SkipItem: none can; the message is the reason of the last one.
      UnavailableError: the disk or the network fails.
    """
    order = list(volumes)
    context.rng("reconstruction", order[0].name.rpartition("_")[0]).shuffle(order)
    for position, volume in enumerate(order):
        try:
            yield from _records(volume, context, making)
            return
        except UnavailableError:
            raise
        except (SkipItem, UserError) as reason:
            if position == len(order) - 1:
                raise SkipItem(str(reason)) from None


def _records(volume: Volume, context: Context, making: Making) -> Iterator[Example]:
    if volume.problem:
        raise SkipItem(volume.problem)
    texts = {"findings": _section(volume.findings), "impression": _section(volume.impression)}
    if context.config == "volumes" and not any(texts.values()):
        raise SkipItem("its report has neither findings nor impression")
    if volume.stored is not None:
        _check_axes(file_of(context, volume.path), volume.stored)
    scan = read_scan(context, volume.name, [("", volume.path)], "CT")
    patient, _, letter = volume.name.rpartition("_")[0].rpartition("_")
    facts: dict[str, Any] = {
        "patient": patient,
        "scan": context.patient(f"{patient}_{letter}"),
        "weight": volume.weight if volume.weight < 1 else None,
        "sex": sex_of(volume.sex),
        "age_band": age_band(volume.age),
        "findings": sorted(name for name, there in volume.labels.items() if there) or None,
    }
    if context.config == "slices":
        yield from slice_records(context, scan, [], making.slices, facts)
    elif context.config == "findings":
        qa = _label_questions(volume.labels, context.rng(volume.name))
        yield _conversation(volume, scan, context, making, facts, qa)
    else:
        yield _conversation(volume, scan, context, making, facts, _report_questions(texts))


def _check_axes(path: epath.Path, stored: Stored) -> None:
    """Raises `SkipItem` where the file's header shows the patient another way round than the metadata."""
    codes = "".join(nib.orientations.aff2axcodes(describe_volume(path).affine))
    if codes != stored.codes:
        raise SkipItem(
            f"its header has the axes {codes}, its metadata {stored.codes}; download the volume of the "
            "folder with `_fixed`"
        )


def _report_questions(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    requests = {"findings": _FINDINGS_REQUEST, "impression": _IMPRESSION_REQUEST}
    return [
        question_meta(requests[section], text, section, label_source="radiologist")
        for section, text in texts.items()
        if text
    ]


def _label_questions(labels: Mapping[str, bool], rng: random.Random) -> list[dict[str, Any]]:
    there = [name for name in FINDINGS if labels.get(name) is True]
    absent = [name for name in FINDINGS if labels.get(name) is False]
    there = rng.sample(there, min(_MOST_ASKED, len(there)))
    absent = rng.sample(absent, min(max(1, len(there)), len(absent)))
    asked = [(name, _YES_NO[0]) for name in there] + [(name, _YES_NO[1]) for name in absent]
    if not asked:
        raise SkipItem("has no label with a value")
    rng.shuffle(asked)
    return [_finding(name, answer, rng) for name, answer in asked]


def _finding(name: str, answer: str, rng: random.Random) -> dict[str, Any]:
    told = with_article(name.lower()) if name in _COUNTABLE else name.lower()
    question = rng.choice(_QUESTIONS).format(name=told)
    return question_meta(question, answer, "finding", options=_YES_NO, label_source="labeler")


def _conversation(
    volume: Volume,
    scan: Scan,
    context: Context,
    making: Making,
    facts: Mapping[str, Any],
    qa: Sequence[Mapping[str, Any]],
) -> Example:
    meta = metadata(context, modality="CT", label_source=qa[0]["label_source"], **facts)
    meta["input_key"] = scan.keys[0]
    if len(making.windows) > 1:
        meta["windows"] = list(making.windows)
    images = [
        context.volume(
            volume.path,
            axis=AXIS,
            window=window if volume.stored is None else volume.stored.window(window),
            modality="CT",
        )
        for window in making.windows.values()
    ]
    exchanges = [(q["question"], q["answer"]) for q in qa]
    return conversation(scan.name, images, exchanges, meta, questions=qa)


def _section(text: str) -> str:
    """A section of a report on one line; "" where it is not given.

    Raises:
      SkipItem: it is no usable text.
    """
    words = " ".join(text.split())
    return "" if words.lower().rstrip(".") in _NOT_GIVEN else text_of(words, "report")


def _presets() -> dict[str, tuple[float, float]]:
    """Presets that are one window."""
    return {name: windows[0] for name, windows in CT_WINDOWS.items() if len(windows) == 1}


def _windows(text: str) -> dict[str, tuple[float, float] | None]:
    known: dict[str, tuple[float, float] | None] = {_MODEL_WINDOW: None, **_presets()}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--windows: {unknown[0]!r} is none of {', '.join(known)}")
    return {name: known[name] for name in names}


def _volume_folders(source: SourceFolder, base: str, instructions: str) -> tuple[dict[str, str], bool]:
    """Split → folder of its volumes, for the splits that are there, and whether their headers are corrected.

    Raises:
      UserError: there are none, or some of both kinds.
    """
    fixed = {split: found for split, n in _FOLDERS.items() if (found := source.find(f"{base}{n}_fixed"))}
    raw = {split: found for split, n in _FOLDERS.items() if (found := source.find(f"{base}{n}"))}
    if raw and fixed:
        raise UserError(
            f"{source.root}: holds {', '.join(raw.values())} and {', '.join(fixed.values())}; values in HU "
            "and values that are still to be rescaled must not be mixed: move the folders without `_fixed` "
            "away"
        )
    if not raw and not fixed:
        wanted = " or ".join(f"{base}{name}_fixed" for name in _FOLDERS.values())
        raise UserError(f"{source.root}: no folder {wanted}. {instructions}")
    return fixed or raw, bool(fixed)


@dataclasses.dataclass(frozen=True)
class _Tables:
    """The tables of a split besides the reports.

    Attributes:
      reports: path of the reports.
      labels: volume → its labels with a value.
      people: volume → (sex, age).
      stored: volume → what its wrong header should say; None where headers are corrected.
      heads: volumes that show no chest.
    """

    reports: str
    labels: Mapping[str, Mapping[str, bool]]
    people: Mapping[str, tuple[str, str]]
    stored: Mapping[str, Stored] | None
    heads: frozenset[str]

    @classmethod
    def read(cls, source: SourceFolder, base: str, split: str, *, fixed: bool, labelled: bool) -> _Tables:
        """Reads the tables; labels and metadata must be there only where they are needed.

        Raises:
          UserError: tables or columns are missing.
        """

        def named(kind: str, stem: str) -> list[str]:
            return [f"{base}{kind}/{prefix}_{stem}" for prefix in _PREFIXES[split]]

        reports = named("radiology_text_reports", "reports.csv")
        labels = named("multi_abnormality_labels", "predicted_labels.csv")
        about = named("metadata", "metadata.csv")
        needed = [reports, *([labels] if labelled else []), *([] if fixed else [about])]
        table = source.require(*needed)[0]
        file = source.find(*about)
        lists = [f"{base}metadata/no_chest_{prefix}.txt" for prefix in _PREFIXES[split]]
        return cls(
            table,
            _labels(source, source.find(*labels)),
            _people(source, file),
            None if fixed else _stored(source, file or ""),
            _no_chest(source, lists),
        )


def _volumes(source: SourceFolder, tables: _Tables, split: str, folder: str) -> list[Volume]:
    """The rows of a split's reports."""
    columns = {"name": ["VolumeName"], "findings": ["Findings_EN"], "impression": ["Impressions_EN"]}
    found, seen = [], set()
    for number, row in enumerate(source.table(tables.reports, columns), 1):
        name = row["name"].strip().removesuffix(_ENDING)
        parts = _VOLUME.fullmatch(name)
        problem = ""
        if parts is None or parts[2] != _FOLDERS[split]:
            problem, name = f"its VolumeName is not {_FOLDERS[split]}_NUMBER_LETTER_NUMBER", ""
        elif name in seen:
            problem = "its volume stands in the table before"
        elif name in DAMAGED:
            problem = "its volume is known to be damaged"
        elif name in tables.heads:
            problem = "shows no chest, by the source's list"
        elif tables.stored is not None and name not in tables.stored:
            problem = "the metadata do not say what its wrong header should"
        seen.add(name)
        path = f"{folder}/{parts[1]}/{parts[1]}_{parts[3]}/{name}{_ENDING}" if parts and name else ""
        found.append(
            Volume(
                f"{tables.reports.rpartition('/')[2]} row {number}",
                name,
                path,
                row["findings"],
                row["impression"],
                tables.labels.get(name, {}),
                *tables.people.get(name, ("", "")),
                stored=(tables.stored or {}).get(name),
                problem=problem,
            )
        )
    return found


def _weighted(volumes: Sequence[Volume]) -> list[Volume]:
    usable = collections.Counter(_scan_of(v) for v in volumes if not v.problem)
    weights = [1.0 if v.problem else 1 / usable[_scan_of(v)] for v in volumes]
    return [
        v if weight == 1 else dataclasses.replace(v, weight=weight)
        for v, weight in zip(volumes, weights, strict=True)
    ]


def _by_scan(volumes: Sequence[Volume]) -> list[tuple[Volume, ...]]:
    """Volumes of one scan together; those that cannot be used only where their scan has no other."""
    scans: dict[str, list[Volume]] = {}
    for volume in volumes:
        scans.setdefault(_scan_of(volume) or volume.row, []).append(volume)  # a bad row stays alone
    return [tuple([v for v in found if not v.problem] or found[:1]) for found in scans.values()]


def _scan_of(volume: Volume) -> str:
    return volume.name.rpartition("_")[0]


def _labels(source: SourceFolder, file: str | None) -> dict[str, dict[str, bool]]:
    """Volume → its labels with a value."""
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
    """Volume → (sex, age), as the metadata have them."""
    if file is None:
        return {}
    optional = {"sex": ["PatientSex"], "age": ["PatientAge"]}
    rows = source.table(file, {"name": ["VolumeName"]}, optional=optional)
    return {
        row["name"].strip().removesuffix(_ENDING): (row.get("sex", ""), row.get("age", "")) for row in rows
    }


def _stored(source: SourceFolder, file: str) -> dict[str, Stored]:
    """Volume → what its header should say, where the metadata say it."""
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
        rows, columns_ = np.array(axes[:3]), np.array(axes[3:])
        # The metadata count to the left, the back and the head; NIfTI to the right, the front and the head.
        turned = np.diag([-1, -1, 1]) @ np.stack([rows, columns_, np.cross(rows, columns_)], axis=1)
        if abs(np.linalg.det(turned)) < 0.5:
            continue
        affine = np.eye(4)
        affine[:3, :3] = turned
        codes = "".join(nib.orientations.aff2axcodes(affine))
        found[row["name"].strip().removesuffix(_ENDING)] = Stored(values[0], values[1], codes)
    return found


def _no_chest(source: SourceFolder, files: Sequence[str]) -> frozenset[str]:
    """Names of volumes that show no chest. Some lines are paths."""
    file = source.find(*files)
    if file is None:
        warnings.warn(
            f"{source.root}: no {files[-1]}, so head scans are not told apart; download dataset/metadata",
            InputWarning,
            stacklevel=2,
        )
        return frozenset()
    lines = source.lines(file)
    return frozenset(line.replace("\\", "/").rpartition("/")[2].removesuffix(_ENDING) for line in lines)


def _name_of(volumes: Sequence[Volume]) -> str:
    return volumes[0].row
