"""What the datasets of MIMIC-CXR share: the lists of MIMIC-CXR-JPG, its films and their patients."""

from __future__ import annotations

import argparse
import hashlib
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from vilam3_jax.data.examples import ImageRef
from vilam3_jax.datasets.conversations import metadata
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UnavailableError, UserError

CITATION = (
    "Johnson et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, "
    "arXiv:1901.07042"
)
LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
PATIENTS = "mimic_cxr"
JPG_INSTRUCTIONS = (
    "From https://physionet.org/content/mimic-cxr-jpg/2.1.0/ (credentialed access): the folder files/ with "
    "p10 to p19, and the tables beside it"
)
JPG_FOLDERS = ("", "mimic-cxr-jpg/2.1.0", "mimic-cxr-jpg", "physionet.org/files/mimic-cxr-jpg/2.1.0")
IMAGES = {"train": 368_960, "validation": 2_991, "test": 5_159}
FRONTAL = ("AP", "PA")
_MANIFEST = "SHA256SUMS.txt"

# Releases and papers spell the second split "validate", "val" and "eval".
_SPLITS = {
    "train": "train",
    "training": "train",
    "validate": "validation",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "eval": "validation",
    "dev": "validation",
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
    """One image.

    Attributes:
      row: of its table, from 1, without the header; names it in messages, as its ids may not.
      subject, study: digits.
      dicom: names the file.
      view: such as "PA" or "LATERAL"; "" if unknown.
      problem: why it cannot be used, or "".
    """

    row: int
    subject: str
    study: str
    dicom: str
    view: str = ""
    problem: str = ""

    @property
    def path(self) -> str:
        """Below the release's folder."""
        return f"{study_path(self.subject, self.study)}/{self.dicom}.jpg"


_Item = TypeVar("_Item", bound=Any)


class MimicDataset(Dataset):
    """A dataset of MIMIC-CXR's patients; `--views` says which films it takes."""

    homepage = "https://physionet.org/content/mimic-cxr-jpg/2.1.0/"
    citation = CITATION
    licence = LICENCE
    access = "credentialed"
    patients = PATIENTS

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares --views."""
        parser.add_argument(
            "--views", choices=("frontal", "all"), default="frontal", help="films of AP and PA views, or all"
        )


def study_path(subject: str, study: str) -> str:
    """The path that a study's folder and report share, without suffix."""
    return f"files/p{subject[:2]}/p{subject}/s{study}"


def number_of(value: object, prefix: str = "") -> str:
    """The digits of an id that spreadsheets may have turned into "50414267.0"; "" if it is none."""
    text = str(value).strip().removesuffix(".0").removeprefix(prefix)
    return text if text.isascii() and text.isdecimal() and 2 <= len(text) <= 20 else ""


def split_named(value: object) -> str:
    """ "train", "validation" or "test" for any spelling of them; "" otherwise."""
    return _SPLITS.get(value.strip().lower(), "") if isinstance(value, str) else ""


def view_named(position: str, code: str = "") -> str:
    """A view from ViewPosition, or where that is blank from the meaning of ViewCodeSequence.

    >>> view_named("Postero-anterior"), view_named("", "left lateral"), view_named("", "Erect")
    ('PA', 'LL', '')
    """
    position, code = position.strip().lower(), code.strip().lower()
    return _VIEW_NAMES.get(position or code, position.upper())


def alternatives(folders: Iterable[str], *names: str) -> list[str]:
    """Every name, also packed, in every folder."""
    return [
        f"{folder}/{name}{suffix}".lstrip("/")
        for folder in folders
        for name in names
        for suffix in ("", ".gz")
    ]


def jpg_tables(*stems: str) -> list[list[str]]:
    """Where tables of MIMIC-CXR-JPG may be, for `SourceFolder.require`; their names keep the number 2.0.0."""
    return [
        alternatives(JPG_FOLDERS, f"mimic-cxr-2.0.0-{stem}.csv", f"mimic-cxr-2.1.0-{stem}.csv")
        for stem in stems
    ]


def required(source: SourceFolder, *wanted: str | Sequence[str]) -> list[str]:
    """`SourceFolder.require`; files that a SHA256SUMS.txt beside them lists are compared with it.

    Raises:
      UserError: something is missing, or a file is not the published one.
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
        for name in found:
            if name in published and _digest(source, name) != published[name]:
                raise UserError(
                    f"{source.root / name}: its sha256 is not that of {_MANIFEST}; download it again, or "
                    f"remove {_MANIFEST} if you changed the file"
                )
    return found


def _digest(source: SourceFolder, name: str) -> str:
    with (source.root / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def jpg_folder(source: SourceFolder) -> str:
    """The folder that holds `files/`, "" for the source folder itself."""
    folder = next((f for f in JPG_FOLDERS if source.find(f"{f}/files".lstrip("/"))), None)
    if folder is None:
        source.require("files")
    return folder or ""


def views_of(source: SourceFolder, metadata_table: str) -> dict[str, str]:
    """Dicom id → view."""
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
    """All films by split, in the order of the split table.

    Args:
      source: the source folder.
      split_table: path of the table.
      views: of `views_of`.

    Raises:
      UserError: a column is missing, or no row names a split.
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
            problem = "its dicom_id stands twice in the table"
        if not split:
            problem = problem or "its split is not known"
        named += bool(split)
        taken.add(dicom)
        film = Film(number, subject, study, dicom, views.get(dicom, ""), problem)
        found.setdefault(split or "train", []).append(film)
    if not named:
        raise UserError(f"{source.root / split_table}: no row has the split train, validate or test")
    return one_split_per_patient(found)


class _Ids(dict[tuple[str, str], str]):
    """(prefix, cell) → `number_of`, one text per id: half of the memory of 377,110 rows, and faster."""

    def __missing__(self, key: tuple[str, str]) -> str:
        return self.setdefault(key, number_of(key[1], key[0]))


def film_problem(subject: str, study: str, dicom: str) -> str:
    """What is wrong with the ids of a row, or ""."""
    if not subject:
        return "its subject_id is no number"
    if not study:
        return "its study_id is no number"
    return "" if _DICOM.fullmatch(dicom) else "its dicom_id is no name of a file"


def one_split_per_patient(items: Mapping[str, list[_Item]]) -> dict[str, list[_Item]]:
    """Skips items whose patient is in a more protected split too; test comes before validation.

    Args:
      items: split → values with `subject` and `problem`, such as films.
    """
    out = {name: list(items[name]) for name in ("train", "validation", "test") if name in items}
    protected: dict[str, str] = {}
    for name in ("test", "validation", "train"):
        kept = out.get(name, [])
        for place, item in enumerate(kept):
            other = protected.get(item.subject)
            if other and not item.problem:
                kept[place] = item._replace(problem=f"its patient is in the {other} split too")
        protected |= {item.subject: name for item in kept if not item.problem}
    return out


def film_image(context: Context, folder: str, film: Film, path: str = "") -> ImageRef:
    """The picture of a film.

    Args:
      context: of the split.
      folder: of `jpg_folder`.
      film: which.
      path: of the picture below `folder`; "" for the release's.

    Raises:
      SkipItem: the film has a problem or its file is missing; the reason names no patient.
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
    except UserError:  # the message names the path, and so the patient
        raise SkipItem("its image cannot be read") from None


def film_meta(context: Context, film: Film, **more: object) -> dict[str, Any]:
    """The metadata of a record about one film."""
    return metadata(
        context,
        modality="CXR",
        patient=film.subject,
        study=context.patient(f"study/{film.study}"),
        view=film.view or None,
        **more,
    )


def row_of(table: str, item: Any) -> str:
    """Names a film, or another item with a `row`, in messages."""
    return f"{table} row {item.row}"
