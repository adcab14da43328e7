"""ChestX-ray14 of the NIH: films with 14 findings, some with radiologists' labels of four findings.

Labels: Wang et al., CVPR 2017 (from reports), and Majkowska et al., Radiology 2020 (four findings).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import chest_findings
from vilam3_jax.datasets.chest_findings import NORMAL, FilmDataset, FilmOptions, States
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.source_files import SourceFolder

FINDINGS = (
    NORMAL,
    "atelectasis",
    "cardiomegaly",
    "consolidation",
    "edema",
    "emphysema",
    "fibrosis",
    "hernia",
    "infiltration",
    "mass",
    "nodule",
    "pleural_effusion",
    "pleural_thickening",
    "pneumonia",
    "pneumothorax",
)
FOUR_FINDINGS = ("fracture", "pneumothorax", "airspace_opacity", "nodule_or_mass")
# Findings evaluated by VILA-M3.
REFERENCE_FINDINGS = FOUR_FINDINGS[:3]
_SPELLINGS = {"effusion": "pleural_effusion", "infiltrate": "infiltration"}
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_EXPECTED = {"train": 86_524, "test": 25_596}
_COLUMNS = {"image": ("Image Index",), "labels": ("Finding Labels",)}
_FILM_COLUMNS = {
    "view": ("View Position",),
    "sex": ("Patient Gender", "Patient Sex"),
    "age": ("Patient Age",),
    "set": ("Set Id",),
}
_FOUR_COLUMNS = {
    "image": ("Image Index",),
    **{finding: (finding.replace("_", " "),) for finding in FOUR_FINDINGS},
}
_FOUR_FOLDER = "four_findings_expert_labels"
_FOUR_EXPECTED = {"validation": 2_414, "test": 1_962}
_SET_IDS = {"validation": ("val", "validation", ""), "test": ("test", "")}
_IMAGE_NAME = re.compile(r"(\d{8})_\d{3}\.(png|jpe?g)")

FolderOf = Callable[[str], str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Film:
    source: str
    row: int  # line of the file
    image: str  # file name
    folder: str = ""
    labels: str | tuple[str, ...] = ""  # the cell "Finding Labels", or those of the four findings
    view: str = ""
    sex: str = ""
    age: str = ""
    problem: str = ""  # reason to skip the film


class ChestXray14(FilmDataset):
    """Yes/no questions about findings on frontal films, or image-text pairs for contrastive training.

    Where VILA-M3's files leave it open:
      - Splits are the official lists; train_val_list.txt is not divided further. Training films are skipped
        if they, or their patient, are in the test list.
      - Findings that are not labelled count as absent. "No Finding" becomes "does this chest X-ray look
        normal?".
      - Training films get up to `--questions` questions; answers are balanced for each finding.
      - `four_findings` is for evaluation. Its patients are also in the official lists; `vilam3 data leaks`
        reports those in a training set.

    `parity`: questions about the four findings have VILA-M3's wording and its three findings (not "nodule or
    mass"). The paper does not train on these films, so none of its defects apply.
    """

    has_parity = True
    findings = FINDINGS
    name = "chest_xray14"
    description = "Frontal chest X-rays with 14 findings, or four findings by radiologists"
    homepage = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
    citation = (
        "Wang X, Peng Y, Lu L, et al. ChestX-ray8: hospital-scale chest X-ray database and benchmarks on "
        "weakly-supervised classification and localization of common thorax diseases. CVPR 2017. "
        "doi:10.1109/CVPR.2017.369. Four findings: Majkowska A, et al. Radiology 2020;294:421-431. "
        "doi:10.1148/radiol.2019191293"
    )
    licence = "NIH: no restriction on use, attribution required"
    instructions = (
        "From https://nihcc.app.box.com/v/ChestXray-NIHCC take Data_Entry_2017_v2020.csv (or "
        "Data_Entry_2017.csv), train_val_list.txt, test_list.txt and images_001.tar.gz to images_012.tar.gz, "
        "unpacked to images/ (or images_001/images/ and so on, as on Kaggle). The variant "
        "'four_findings' takes the images and four_findings_expert_labels/{test,validation}_labels.csv of "
        "https://cloud.google.com/healthcare-api/docs/resources/public-datasets/nih-chest."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "questions": "the official lists with yes/no questions",
        "four_findings": "validation and test films labelled by radiologists, with yes/no questions",
        "pairs": "the official lists, each film with a sentence generated from its labels",
    }

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        if self.config == "four_findings":
            return self._four_findings(source)
        folder_of, (table, *lists) = _files(source, _TABLES, *_LISTS.values())
        films = _by_list(source, table, dict(zip(_LISTS, lists, strict=True)), folder_of)
        weights = chest_findings.answer_weights((film.labels for film in films["train"]), _states)
        found = {}
        for split, expected in _EXPECTED.items():
            options = self.film_options("labeler", weights if split == "train" else None)
            make = functools.partial(_make, options=options)
            found[split] = Split(films[split], make, chest_findings.film_name, expected)
        return found

    def _four_findings(self, source: SourceFolder) -> Mapping[str, Split]:
        names = (f"{split}_labels.csv" for split in _FOUR_EXPECTED)
        folder_of, files = _files(source, *((f"{_FOUR_FOLDER}/{name}", name) for name in names))
        make = functools.partial(_make, options=self.film_options("radiologist"))
        found = {}
        for (split, expected), file in zip(_FOUR_EXPECTED.items(), files, strict=True):
            films = _four_films(source, file, split, folder_of)
            found[split] = Split(films, make, chest_findings.film_name, expected)
        return found


def _files(source: SourceFolder, *needed: str | Sequence[str]) -> tuple[FolderOf, Sequence[str]]:
    """Returns (image name → folder, the needed files)."""
    parts = [name for name in source.glob("images_[0-9][0-9][0-9]") if "." not in name]
    _, *files = source.require(["images", *(parts or ["images_001"])], *needed)
    inner = [source.find(f"{part}/images") or part for part in parts]
    listed = {path.rpartition("/")[2]: folder for folder in inner for path in source.files(folder)}
    default = source.find("images") or inner[0]
    return lambda image: listed.get(image, default), files


def _by_list(
    source: SourceFolder, table: str, lists: Mapping[str, str], folder_of: FolderOf
) -> dict[str, list[_Film]]:
    """Returns the films of each list. Rows in no list are appended to "train" with a problem."""
    rows: dict[str, _Film] = {}
    for film, _ in _read(source, table, _COLUMNS, ("labels",), folder_of):
        if film.image in rows:
            film = dataclasses.replace(film, problem=f"is in {table} twice")
        rows[film.image] = film
    images = {split: source.lines(name) for split, name in lists.items()}
    test_images = set(images["test"])
    test_patients = {_patient(image) for image in test_images}
    films: dict[str, list[_Film]] = {split: [] for split in lists}
    seen: set[str] = set()
    for split, of_split in images.items():
        for number, image in enumerate(of_split, 1):
            film = rows.get(image) or _Film(lists[split], number, image, problem=f"has no row in {table}")
            if image in seen:
                film = dataclasses.replace(film, source=lists[split], row=number, problem="is listed twice")
            elif split == "train" and image in test_images:
                film = dataclasses.replace(film, problem=f"is in {lists['test']} too")
            else:
                seen.add(image)
                if split == "train" and _patient(image) in test_patients:
                    film = dataclasses.replace(film, problem=f"its patient is in {lists['test']}")
            films[split].append(film)
    listed = seen | test_images
    films["train"] += [
        dataclasses.replace(film, problem="is in neither list")
        for image, film in rows.items()
        if image not in listed
    ]
    return films


def _read(
    source: SourceFolder,
    table: str,
    columns: Mapping[str, Sequence[str]],
    label_columns: Sequence[str],
    folder_of: FolderOf,
) -> Iterator[tuple[_Film, str]]:
    """Yields (film, its "Set Id")."""
    for number, row in enumerate(source.table(table, columns, optional=_FILM_COLUMNS), 2):
        labels = tuple(sys.intern(row[column].strip()) for column in label_columns)
        view, sex, age, set_id = (sys.intern(row.get(key, "").strip()) for key in _FILM_COLUMNS)
        image = row["image"].strip()
        cells = labels[0] if len(label_columns) == 1 else labels
        yield _Film(table, number, image, folder_of(image), cells, view, sex, age), set_id


def _four_films(source: SourceFolder, table: str, split: str, folder_of: FolderOf) -> list[_Film]:
    seen: set[str] = set()
    films = []
    for film, set_id in _read(source, table, _FOUR_COLUMNS, FOUR_FINDINGS, folder_of):
        problem = "" if set_id.lower() in _SET_IDS[split] else f"is not of the {split} set"
        if film.image in seen:
            problem = "is listed twice"
        seen.add(film.image)
        films.append(dataclasses.replace(film, problem=problem))
    return films


def _make(film: _Film, context: Context, options: FilmOptions) -> Iterator[Example]:
    if film.problem:
        raise SkipItem(film.problem)
    if not _IMAGE_NAME.fullmatch(film.image):
        raise SkipItem("its image index is not a file name of the release, such as 00000001_000.png")
    states = _states(film.labels)
    if context.parity and context.config == "four_findings":
        states = {finding: states[finding] for finding in REFERENCE_FINDINGS}
        options = dataclasses.replace(options, reference=True)
    patient, view = _patient(film.image), film.view.upper()
    meta = chest_findings.film_meta(context, film, states, options, patient=patient, view=view)
    name, image = film.image.rpartition(".")[0], context.image(f"{film.folder}/{film.image}")
    yield chest_findings.film_record(name, image, states, meta, context, options)


def _states(labels: str | tuple[str, ...]) -> States:
    """Converts the four labels, or findings such as "Cardiomegaly|Effusion", to states."""
    if isinstance(labels, tuple):
        for finding, cell in zip(FOUR_FINDINGS, labels, strict=True):
            if cell.upper() not in ("YES", "NO"):
                raise SkipItem(f"the label {finding.replace('_', ' ')} is neither YES nor NO")
        return {f: cell.upper() == "YES" for f, cell in zip(FOUR_FINDINGS, labels, strict=True)}
    words = ("_".join(part.lower().split()) for part in labels.split("|"))
    found = {_SPELLINGS.get(word, word) for word in words}
    if found == {""}:
        raise SkipItem("has no finding labels")
    if not found <= set(FINDINGS):
        raise SkipItem("has a finding label that is none of the 15")
    if NORMAL in found and len(found) > 1:
        raise SkipItem("labelled with no finding and with a finding")
    return {finding: finding in found for finding in FINDINGS}


def _patient(image: str) -> str:
    return image.partition("_")[0]
