"""ChestX-ray14 of the NIH: films with 14 findings, and radiologists' labels of four findings for some.

Labels: Wang et al., CVPR 2017 (from reports), and Majkowska et al., Radiology 2020 (four findings).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets.chest_findings import (
    NORMAL,
    Ask,
    add_wording,
    answer_weights,
    film_caption,
    film_example,
    known_labels,
)
from vilam3_jax.datasets.conversations import metadata, pair
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.subgroups import age_band, sex_of
from vilam3_jax.errors import UserError

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
# Those that VILA-M3 evaluates.
REFERENCE_FINDINGS = FOUR_FINDINGS[:3]
_SPELLINGS = {"effusion": "pleural_effusion", "infiltrate": "infiltration"}
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_EXPECTED = {"train": 86_524, "test": 25_596}
_COLUMNS = {"image": ("Image Index",)}
_FILM_COLUMNS = {
    "view": ("View Position",),
    "sex": ("Patient Gender", "Patient Sex"),
    "age": ("Patient Age",),
}
_FOUR_COLUMNS = {finding: (finding.replace("_", " "),) for finding in FOUR_FINDINGS}
_FOUR_FOLDER = "four_findings_expert_labels"
_FOUR_EXPECTED = {"validation": 2_414, "test": 1_962}
_SET_IDS = {"validation": ("val", "validation"), "test": ("test",)}
_IMAGE_NAME = re.compile(r"(\d{8})_\d{3}\.(png|jpe?g)")

FolderOf = Callable[[str], str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Film:
    """A film that a list names.

    Attributes:
      source, row: the file and the line that name it.
      image: name of the image file.
      folder: where it lies.
      labels: the cell "Finding Labels", or a cell for each of the four findings.
      view, sex, age: cells; "" where the file does not have them.
      problem: why it cannot be used, "" for no reason.
    """

    source: str
    row: int
    image: str
    folder: str = ""
    labels: str | tuple[str, ...] = ""
    view: str = ""
    sex: str = ""
    age: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is done with the films of a split.

    Attributes:
      ask: how films are asked about, and whose the labels are.
      wording: see `chest_findings.add_wording`.
    """

    ask: Ask
    wording: str = "varied"


class ChestXray14(Dataset):
    """Yes/no questions about findings on frontal films, or image-text pairs for contrastive training.

    Choices, where VILA-M3's files say nothing:
      - The splits are the official lists; train_val_list.txt is not divided further. A training film that the
        test list names too, or whose patient it names, is skipped.
      - A finding that a film is not labelled with counts as absent. "No Finding" is asked about as "does this
        chest X-ray look normal?".
      - Training films get up to `--questions` questions; each finding is answered yes about as often as no.
      - `four_findings` is for evaluation. Its patients are patients of the lists: `vilam3 data leaks` tells
        which of them a training set holds.

    `parity`: the questions of the four findings are VILA-M3's, in its words and about the three that it
    evaluates (it leaves "nodule or mass" out). The paper does not train on these films, and none of its
    defects is in these data.
    """

    has_parity = True
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
        "unpacked to images/ (or images_001/images/ and so on, as Kaggle has them). The variant "
        "'four_findings' takes the images and four_findings_expert_labels/{test,validation}_labels.csv of "
        "https://cloud.google.com/healthcare-api/docs/resources/public-datasets/nih-chest."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "questions": "the official lists with yes/no questions",
        "four_findings": "validation and test films labelled by radiologists, with yes/no questions",
        "pairs": "the official lists, each film with a sentence made of its labels",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """How many questions, and how sentences are worded."""
        parser.add_argument(
            "--questions", type=int, default=8, help="questions for one training film, at most (8)"
        )
        add_wording(parser)

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Reads Data_Entry and the two lists, or the labels of the four findings."""
        if not 1 <= self.options.questions <= len(FINDINGS):
            raise UserError(f"--questions {self.options.questions}: give 1 to {len(FINDINGS)}")
        if self.config == "four_findings":
            return self._four_findings(source)
        folder_of, (table, *lists) = _files(source, _TABLES, *_LISTS.values())
        films = _by_list(source, table, dict(zip(_LISTS, lists, strict=True)), folder_of)
        asks = {
            "train": Ask(self.options.questions, "labeler", weights=_weights(films["train"])),
            "test": Ask(0, "labeler"),
        }
        make = _pair if self.config == "pairs" else _questions
        return {
            name: Split(
                films[name],
                functools.partial(make, plan=_Plan(ask, self.options.wording)),
                _name_of,
                _EXPECTED[name],
            )
            for name, ask in asks.items()
        }

    def _four_findings(self, source: SourceFolder) -> Mapping[str, Split]:
        names = (f"{split}_labels.csv" for split in _FOUR_EXPECTED)
        folder_of, files = _files(source, *((f"{_FOUR_FOLDER}/{name}", name) for name in names))
        make = functools.partial(_four, plan=_Plan(Ask(0, "radiologist")))
        return {
            split: Split(
                _marked(_four_films(source, file, split, folder_of)), make, _name_of, _FOUR_EXPECTED[split]
            )
            for split, file in zip(_FOUR_EXPECTED, files, strict=True)
        }


def _files(source: SourceFolder, *needed: str | Sequence[str]) -> tuple[FolderOf, Sequence[str]]:
    """(image name → its folder, the needed files).

    Raises:
      UserError: names everything that is missing, folders of images included.
    """
    parts = [name for name in source.glob("images_[0-9][0-9][0-9]") if "." not in name]
    _, *files = source.require(["images", *(parts or ["images_001"])], *needed)
    inner = [source.find(f"{part}/images") or part for part in parts]
    listed = {path.rpartition("/")[2]: folder for folder in inner for path in source.files(folder)}
    default = source.find("images") or inner[0]
    return lambda image: listed.get(image, default), files


def _by_list(
    source: SourceFolder, table: str, lists: Mapping[str, str], folder_of: FolderOf
) -> dict[str, list[_Film]]:
    """The films of each list. Rows that no list names come last in "train", with that as their problem."""
    rows: dict[str, _Film] = {}
    films: dict[str, list[_Film]] = {split: [] for split in lists}
    columns = {**_COLUMNS, "labels": ("Finding Labels",)}
    for film in _films(source, table, columns, folder_of):
        if film.image in rows:
            film = dataclasses.replace(film, problem=f"is in {table} twice")
        rows[film.image] = film
    named = {split: source.lines(name) for split, name in lists.items()}
    seen: set[str] = set()
    kept_out = set(named["test"])
    patients_kept_out = {_patient(image) for image in kept_out}
    for split, images in named.items():
        for number, image in enumerate(images, 1):
            film = rows.get(image) or _Film(lists[split], number, image, problem=f"has no row in {table}")
            if image in seen:
                film = dataclasses.replace(film, source=lists[split], row=number, problem="is listed twice")
            elif split == "train" and image in kept_out:
                film = dataclasses.replace(film, problem=f"is in {lists['test']} too")
            elif split == "train" and _patient(image) in patients_kept_out:
                film = dataclasses.replace(film, problem=f"its patient is in {lists['test']}")
                seen.add(image)
            else:
                seen.add(image)
            films[split].append(film)
    everywhere = seen | kept_out
    films["train"] += [
        dataclasses.replace(film, problem="is in neither list")
        for image, film in rows.items()
        if image not in everywhere
    ]
    return films


def _films(
    source: SourceFolder, table: str, columns: Mapping[str, Sequence[str]], folder_of: FolderOf
) -> Iterator[_Film]:
    for number, row in enumerate(source.table(table, columns, optional=_FILM_COLUMNS), 2):
        view, sex, age = (sys.intern(row.get(key, "").strip()) for key in _FILM_COLUMNS)
        labels = sys.intern(row["labels"].strip())
        image = row["image"].strip()
        yield _Film(table, number, image, folder_of(image), labels, view, sex, age)


def _four_films(source: SourceFolder, table: str, split: str, folder_of: FolderOf) -> Iterator[_Film]:
    optional = {**_FILM_COLUMNS, "set": ("Set Id",)}
    for number, row in enumerate(source.table(table, {**_COLUMNS, **_FOUR_COLUMNS}, optional=optional), 2):
        labels = tuple(sys.intern(row[finding].strip().upper()) for finding in FOUR_FINDINGS)
        view, sex, age = (sys.intern(row.get(key, "").strip()) for key in _FILM_COLUMNS)
        there = row.get("set", "").strip().lower()
        problem = f"is not of the {split} set" if there and there not in _SET_IDS[split] else ""
        image = row["image"].strip()
        yield _Film(table, number, image, folder_of(image), labels, view, sex, age, problem)


def _marked(films: Iterable[_Film]) -> list[_Film]:
    """The films, with those that came before marked."""
    seen: set[str] = set()
    kept = []
    for film in films:
        kept.append(dataclasses.replace(film, problem="is listed twice") if film.image in seen else film)
        seen.add(film.image)
    return kept


def _weights(films: Sequence[_Film]) -> dict[tuple[str, bool], float]:
    alike = collections.Counter(film.labels for film in films if isinstance(film.labels, str))
    known = collections.Counter()
    for labels, number in alike.items():
        present = _present(labels)
        if isinstance(present, set):
            known[known_labels({finding: finding in present for finding in FINDINGS})] += number
    return answer_weights(known)


def _name_of(film: _Film) -> str:
    return f"{film.source} row {film.row}"


def _questions(film: _Film, context: Context, plan: _Plan) -> Iterator[Example]:
    states = _states(film)
    meta = _meta(film, context, plan, states)
    yield film_example(_id(film), _image(film, context), states, meta, context, plan.ask)


def _pair(film: _Film, context: Context, plan: _Plan) -> Iterator[Example]:
    states = _states(film)
    rng = context.rng(_id(film), "caption") if plan.wording == "varied" else None
    meta = _meta(film, context, plan, states)
    yield pair(_id(film), _image(film, context), film_caption(states, rng), meta, kind="pair")


def _four(film: _Film, context: Context, plan: _Plan) -> Iterator[Example]:
    _refuse(film)
    states: dict[str, bool | None] = {}
    for finding, cell in zip(FOUR_FINDINGS, film.labels, strict=True):
        if cell not in ("YES", "NO"):
            raise SkipItem(f"the label {finding.replace('_', ' ')} is neither YES nor NO")
        states[finding] = cell == "YES"
    if context.parity:
        states = {finding: states[finding] for finding in REFERENCE_FINDINGS}
    ask = dataclasses.replace(plan.ask, reference=context.parity)
    meta = _meta(film, context, plan, states)
    yield film_example(_id(film), _image(film, context), states, meta, context, ask)


def _refuse(film: _Film) -> None:
    if film.problem:
        raise SkipItem(film.problem)
    if not _IMAGE_NAME.fullmatch(film.image):
        raise SkipItem("its image index is no file name of the release, such as 00000001_000.png")


def _states(film: _Film) -> dict[str, bool | None]:
    _refuse(film)
    present = _present(str(film.labels))
    if isinstance(present, str):
        raise SkipItem(present)
    return {finding: finding in present for finding in FINDINGS}


def _present(labels: str) -> set[str] | str:
    """The findings of a cell such as "Cardiomegaly|Effusion", or what is wrong with it."""
    words = ("_".join(part.lower().split()) for part in labels.split("|"))
    found = {_SPELLINGS.get(word, word) for word in words}
    if found == {""}:
        return "has no finding labels"
    if not found <= set(FINDINGS):
        return "has a finding label that is none of the 15"
    if NORMAL in found and len(found) > 1:
        return "labelled with no finding and with a finding"
    return found


def _patient(image: str) -> str:
    return image.partition("_")[0]


def _id(film: _Film) -> str:
    return film.image.rpartition(".")[0]


def _image(film: _Film, context: Context) -> ImageRef:
    return context.image(f"{film.folder}/{film.image}")


def _meta(film: _Film, context: Context, plan: _Plan, states: Mapping[str, bool | None]) -> dict:
    return metadata(
        context,
        modality="CXR",
        patient=_patient(film.image),
        view=film.view.upper() or None,
        sex=sex_of(film.sex),
        age_band=age_band(film.age),
        label_source=plan.ask.label_source,
        findings=[finding for finding, there in states.items() if there],
    )
