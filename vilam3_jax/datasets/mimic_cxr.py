"""Shared code of the MIMIC-CXR datasets: tables, films and patient splits of MIMIC-CXR-JPG."""

from __future__ import annotations

import argparse
import hashlib
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vilam3_jax.data.examples import ImageRef
from vilam3_jax.datasets.conversations import metadata
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UnavailableError, UserError

JPG_INSTRUCTIONS = (
    "From https://physionet.org/content/mimic-cxr-jpg/2.1.0/ (credentialed access): the folder files/ with "
    "p10 to p19, and the tables beside it"
)
JPG_FOLDERS = ("", "mimic-cxr-jpg/2.1.0", "mimic-cxr-jpg", "physionet.org/files/mimic-cxr-jpg/2.1.0")
IMAGES = {"train": 368_960, "validation": 2_991, "test": 5_159}
FRONTAL = ("AP", "PA")
_MANIFEST = "SHA256SUMS.txt"

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validate", "validation", "valid", "val", "eval", "dev"), "validation"),
    "test": "test",
}
_VIEW_NAMES = {
    "postero-anterior": "PA",
    "antero-posterior": "AP",
    "lateral": "LATERAL",
    "left lateral": "LL",
    "right lateral": "RL",
    "left anterior oblique": "LAO",
    "right anterior oblique": "RAO",
}
_DICOM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Film(NamedTuple):
    """An image.

    Attributes:
      row: row of its table, from 1 without the header; used in messages instead of ids.
      subject, study: digits.
      dicom: stem of the file name.
      view: such as "PA" or "LATERAL"; "" if unknown.
      problem: reason to skip the film, or "".
    """

    row: int
    subject: str
    study: str
    dicom: str
    view: str = ""
    problem: str = ""

    @property
    def path(self) -> str:
        """Path below the folder of the release."""
        return f"{study_path(self.subject, self.study)}/{self.dicom}.jpg"


class MimicDataset(Dataset):
    """Base class of datasets of MIMIC-CXR's patients."""

    homepage = "https://physionet.org/content/mimic-cxr-jpg/2.1.0/"
    citation = (
        "Johnson et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, "
        "arXiv:1901.07042"
    )
    licence = "PhysioNet Credentialed Health Data License 1.5.0"
    access = "credentialed"
    patients = "mimic_cxr"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--views`."""
        parser.add_argument(
            "--views", choices=("frontal", "all"), default="frontal", help="AP and PA films, or all films"
        )


def study_path(subject: str, study: str) -> str:
    """Returns the path of a study's folder, which is also that of its report without suffix."""
    return f"files/p{subject[:2]}/p{subject}/s{study}"


def number_of(value: object, prefix: str = "") -> str:
    """Returns the digits of an id, also if stored as "50414267.0"; "" if it is not a number."""
    text = str(value).strip().removesuffix(".0").removeprefix(prefix)
    return text if text.isascii() and text.isdecimal() and 2 <= len(text) <= 20 else ""


def split_named(value: object) -> str:
    """Normalizes the name of a split; "" if it is unknown."""
    return _SPLITS.get(value.strip().lower(), "") if isinstance(value, str) else ""


def view_named(position: str, code: str = "") -> str:
    """Returns a view, given ViewPosition or, if that is blank, the meaning of ViewCodeSequence.

    >>> view_named("Postero-anterior"), view_named("", "left lateral"), view_named("", "Erect")
    ('PA', 'LL', '')
    """
    position, code = position.strip().lower(), code.strip().lower()
    return _VIEW_NAMES.get(position or code, position.upper())


def alternatives(folders: Iterable[str], *names: str) -> list[str]:
    """Returns every name, also compressed, in every folder."""
    return [
        f"{folder}/{name}{suffix}".lstrip("/")
        for folder in folders
        for name in names
        for suffix in ("", ".gz")
    ]


def jpg_tables(*stems: str) -> list[list[str]]:
    """Returns candidate paths of MIMIC-CXR-JPG tables; release 2.1.0 kept names with 2.0.0."""
    return [
        alternatives(JPG_FOLDERS, f"mimic-cxr-2.0.0-{stem}.csv", f"mimic-cxr-2.1.0-{stem}.csv")
        for stem in stems
    ]


def required(source: SourceFolder, *wanted: str | Sequence[str]) -> list[str]:
    """Calls `SourceFolder.require` and verifies files listed in a SHA256SUMS.txt next to them.

    Raises:
      UserError: a file is missing or differs from the published one.
    """
    found = source.require(*wanted)
    for folder in dict.fromkeys(posixpath.dirname(name) for name in found):
        manifest = source.find(posixpath.join(folder, _MANIFEST))
        if manifest is None:
            continue
        published = {}
        for line in source.lines(manifest):
            digest, _, name = line.partition(" ")
            published[posixpath.join(folder, name.strip(" *").removeprefix("./"))] = digest.lower()
        for name in (name for name in found if name in published):
            with (source.root / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            if digest != published[name]:
                raise UserError(
                    f"{source.root / name}: its sha256 is not that of {_MANIFEST}; download it again, or "
                    f"remove {_MANIFEST} if you changed the file"
                )
    return found


def jpg_folder(source: SourceFolder) -> str:
    """Returns the folder that contains `files/`, "" for the source folder."""
    folder = next((f for f in JPG_FOLDERS if source.find(f"{f}/files".lstrip("/"))), None)
    if folder is None:
        source.require("files")
    return folder or ""


def views_of(source: SourceFolder, metadata_table: str) -> dict[str, str]:
    """Reads DICOM id → view."""
    rows = source.table(
        metadata_table,
        {"dicom": ("dicom_id",), "position": ("ViewPosition",)},
        optional={"code": ("ViewCodeSequence_CodeMeaning",)},
    )
    known: dict[str, str] = {}
    return {
        row["dicom"].strip(): known.setdefault(view, view)
        for row in rows
        if (view := view_named(row["position"], row.get("code", "")))
    }


def films_of(source: SourceFolder, split_table: str, views: Mapping[str, str]) -> dict[str, list[Film]]:
    """Reads all films by split, in the order of the split table.

    Raises:
      UserError: a column is missing, or no row has a known split.
    """
    columns = {
        "dicom": ("dicom_id",),
        "study": ("study_id",),
        "subject": ("subject_id",),
        "split": ("split",),
    }
    found: dict[str, list[Film]] = {}
    taken: set[str] = set()
    ids = _Ids()
    named = 0
    for number, row in enumerate(source.table(split_table, columns), 1):
        split, dicom = split_named(row["split"]), row["dicom"].strip()
        subject, study = ids["p", row["subject"]], ids["s", row["study"]]
        problem = film_problem(subject, study, dicom)
        if not problem and dicom in taken:
            problem = "its dicom_id is a duplicate"
        if not split:
            problem = problem or "its split is unknown"
        named += bool(split)
        taken.add(dicom)
        film = Film(number, subject, study, dicom, views.get(dicom, ""), problem)
        found.setdefault(split or "train", []).append(film)
    if not named:
        raise UserError(f"{source.root / split_table}: no row has the split train, validate or test")
    return one_split_per_patient(found)


class _Ids(dict[tuple[str, str], str]):
    """Caches `number_of` by (prefix, cell), which halves the memory of 377,110 rows."""

    def __missing__(self, key: tuple[str, str]) -> str:
        return self.setdefault(key, number_of(key[1], key[0]))


def film_problem(subject: str, study: str, dicom: str) -> str:
    """Returns what is wrong with the ids of a row, or ""."""
    if not subject:
        return "its subject_id is not a number"
    if not study:
        return "its study_id is not a number"
    return "" if _DICOM.fullmatch(dicom) else "its dicom_id is not a file name"


def one_split_per_patient(items: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Sets a problem for items whose patient is also in a more protected split: test, then validation.

    Args:
      items: split → films, or named tuples with a field `film`.
    """
    out: dict[str, list[Any]] = {name: [] for name in ("train", "validation", "test") if name in items}
    protected: dict[str, str] = {}
    for name in reversed(out):
        kept = {}
        for item in items[name]:
            film: Film = item if isinstance(item, Film) else item.film
            if film.problem:
                pass
            elif other := protected.get(film.subject):
                film = film._replace(problem=f"its patient is in the {other} split too")
                item = film if isinstance(item, Film) else item._replace(film=film)
            else:
                kept[film.subject] = name
            out[name].append(item)
        protected |= kept
    return out


def film_image(context: Context, folder: str, film: Film, path: str = "") -> ImageRef:
    """Returns the image of a film; `path` is below `folder`, by default that of the release.

    Raises:
      SkipItem: the film has a problem, or its file is missing; the reason does not identify the patient.
    """
    if film.problem:
        raise SkipItem(film.problem)
    path = posixpath.normpath(f"{folder}/{path or film.path}".lstrip("/"))
    try:
        return context.image(path)
    except SkipItem as reason:
        raise SkipItem(str(reason).replace(f"image {path}", "its image")) from None
    except UnavailableError:
        raise
    except UserError:  # its message contains the path, and so the patient
        raise SkipItem("its image cannot be read") from None


def film_meta(context: Context, film: Film, **more: object) -> dict[str, Any]:
    """Returns the metadata of a record about a film."""
    return metadata(
        context,
        modality="CXR",
        patient=film.subject,
        study=context.patient(f"study/{film.study}"),
        view=film.view or None,
        **more,
    )


def row_of(table: str, item: Any) -> str:
    """Returns the name of a film, or another item with a `row`, in messages."""
    return f"{table} row {item.row}"
