"""TotalSegmentator's CT dataset, v2.0.1: body CTs with a binary mask for each of 117 structures."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.labels import is_lesion, label_table
from vilam3_jax.datasets import labelled_scans
from vilam3_jax.datasets.dataset import Context, SkipItem, Skipped, Split
from vilam3_jax.datasets.labelled_scans import LabelledScans, Scan, SliceOptions, Structure, structure
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.subgroups import age_band, sex_of
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

SUBJECTS = {"train": 1082, "validation": 57, "test": 89}
STRUCTURES = 117
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_ENDING = ".nii.gz"
# Structures of v1 that v2 renamed or removed.
_ONLY_V1 = {
    "face",
    "heart_atrium_left",
    "heart_atrium_right",
    "heart_myocardium",
    "heart_ventricle_left",
    "heart_ventricle_right",
    "pulmonary_artery",
}
_V1_SUBJECTS, _V3_SUBJECTS = 1204, 1939
_OTHER_VERSION = "v2.0.1 is required; download Totalsegmentator_dataset_v201.zip from Zenodo record 10047292"


@dataclasses.dataclass(frozen=True)
class _Subject:
    row: str  # name in messages, such as "meta.csv row 7"
    name: str  # folder below the source folder
    sex: str
    age: str
    problem: str = ""  # reason to skip the row


class TotalSegmentator(LabelledScans):
    """Studies of CT slices, or questions about the structures they show.

    Each slice is asked about up to three structures that it shows and three that it does not, preferably ones
    elsewhere in the scan. Cysts are asked about in scans that have one. Structures are named as in VISTA3D's
    labels. VILA-M3's choice of slices was not released.
    """

    name = "totalsegmentator"
    description = "1,228 CTs of all body regions with masks of 117 structures."
    homepage = "https://doi.org/10.5281/zenodo.10047292"
    citation = (
        "Wasserthal et al., TotalSegmentator: Robust Segmentation of 104 Anatomic Structures in CT Images, "
        "Radiology: Artificial Intelligence 5(5) (2023)"
    )
    licence = "CC-BY-4.0"
    instructions = (
        "Fetch Totalsegmentator_dataset_v201.zip from https://zenodo.org/records/10047292 (v2.0.1; the "
        "record without a version serves v3.0.0) and unpack it. The source folder holds meta.csv and, for "
        "each subject, s0000/ct.nii.gz and s0000/segmentations/STRUCTURE.nii.gz."
    )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        (table,) = source.require(["meta.csv", "Totalsegmentator_dataset_v201/meta.csv"])
        folder = table.removesuffix("meta.csv")
        subjects = _subjects(source, table, folder)
        _check_version(source, table, subjects)
        return {
            split: self.case_split(items, _make_subject, SUBJECTS[split]) for split, items in subjects.items()
        }


def _make_subject(subject: _Subject, context: Context, options: SliceOptions) -> Iterator[Example | Skipped]:
    """Yields the records of a subject; unreadable masks are skipped individually."""
    name, files = subject.name.rpartition("/")[2], [("", f"{subject.name}/ct{_ENDING}")]
    scan = labelled_scans.read_scan(context, name, files, "CT")
    masks = _mask_names(paths.as_path(context.root) / subject.name / "segmentations")
    if not masks:
        raise SkipItem("has no folder `segmentations` with masks")
    if old := _ONLY_V1 & set(masks):
        raise SkipItem(f"has the mask {min(old)} of v1; {_OTHER_VERSION}")
    structures: list[Structure] = []
    for mask in masks:
        made = _structure(context, subject, mask, scan)
        if isinstance(made, Structure):
            structures.append(made)
        elif made is not None:
            yield made
    if len(masks) < STRUCTURES:
        yield Skipped(
            f"{subject.row}, segmentations",
            f"{STRUCTURES - len(masks)} of {STRUCTURES} masks are missing; nothing is asked about them",
        )
    facts = {"patient": scan.name, "sex": sex_of(subject.sex), "age_band": age_band(subject.age)}
    yield from labelled_scans.slice_records(context, scan, structures, options, facts)


@functools.cache
def _names() -> dict[frozenset[str], str]:
    return {frozenset(name.lower().split()): name for name in label_table("VISTA3D").values()}


def structure_name(mask: str) -> str | None:
    """Returns the VISTA3D label for a mask name, whatever the order of words; None if there is none.

    >>> structure_name("lung_upper_lobe_left"), structure_name("urinary_bladder")
    ('left lung upper lobe', 'bladder')
    """
    words = {"urinary_bladder": "bladder"}.get(mask, mask).lower().split("_")
    return _names().get(frozenset(words))


def _structure(context: Context, subject: _Subject, mask: str, scan: Scan) -> Structure | Skipped | None:
    """Reads the structure of a mask; None for an absent cyst, which is not asked about."""
    record, name = f"{subject.row}, mask {mask}", structure_name(mask)
    if name is None:
        return Skipped(record, "is none of the structures of v2.0.1")
    try:
        path = f"{subject.name}/segmentations/{mask}{_ENDING}"
        marked = labelled_scans.read_labels(context, path, scan) > 0
    except UnavailableError:
        raise
    except (SkipItem, UserError) as error:
        return Skipped(record, str(error))
    if not is_lesion(name):
        return structure(name, marked, scan)
    return structure(name, marked, scan, "lesion", counted=True) if marked.any() else None


def _mask_names(folder: epath.Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir())
    return sorted(n.removesuffix(_ENDING) for n in names if n.endswith(_ENDING) and not n.startswith("."))


def _subjects(source: SourceFolder, table: str, folder: str) -> dict[str, list[_Subject]]:
    rows = source.table(
        table,
        {"name": ["image_id"], "split": ["split"]},
        optional={"age": ["age"], "sex": ["gender", "sex"]},
        delimiter=";",
    )
    found: dict[str, list[_Subject]] = {split: [] for split in SUBJECTS}
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        name, split = row["name"].strip(), _SPLITS.get(row["split"].strip().lower())
        problem = ""
        if not re.fullmatch(r"[A-Za-z0-9-]+", name):
            problem = "states no image_id of letters and digits"
        elif name in seen:
            problem = "its subject is a duplicate"
        elif split is None:
            problem = "its split is none of train, val and test"
        seen.add(name)
        subject = _Subject(
            f"meta.csv row {number}", folder + name, row.get("sex", ""), row.get("age", ""), problem
        )
        found[split or "train"].append(subject)
    return found


def _check_version(source: SourceFolder, table: str, subjects: Mapping[str, Sequence[_Subject]]) -> None:
    """Raises `UserError` for other versions, judging by the number of subjects and the first masks."""
    file, rows = source.root / table, [s for split in subjects.values() for s in split]
    if len(rows) > sum(SUBJECTS.values()):
        named = "v3.0.0" if len(rows) == _V3_SUBJECTS else "a later version"
        raise UserError(f"{file}: has {len(rows)} subjects, as {named} has; {_OTHER_VERSION}")
    if len(rows) == _V1_SUBJECTS:
        raise UserError(f"{file}: has {len(rows)} subjects, as v1 has; {_OTHER_VERSION}")
    for subject in (s for s in rows if not s.problem):
        masks = _mask_names(source.root / subject.name / "segmentations")
        if old := _ONLY_V1 & set(masks):
            raise UserError(f"{file}: its subjects have masks of v1, such as {min(old)}; {_OTHER_VERSION}")
        if len(masks) > STRUCTURES:
            raise UserError(
                f"{file}: its subjects have {len(masks)} masks instead of {STRUCTURES}; {_OTHER_VERSION}"
            )
        if masks:
            return
