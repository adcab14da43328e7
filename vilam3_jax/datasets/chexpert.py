"""CheXpert: films of Stanford with the labeler's findings, and 500 test studies with radiologists' labels.

Layout: v1.0 and v1.0-small as Stanford AIMI gives them, the test images as CheXlocalize gives them, and the
test labels of github.com/rajpurkarlab/cheXpert-test-set-labels. Labels: Irvin et al., AAAI 2019.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets.chest_findings import (
    NORMAL,
    Ask,
    Known,
    add_wording,
    answer_weights,
    column_names,
    film_caption,
    film_example,
    known_labels,
)
from vilam3_jax.datasets.conversations import metadata, pair
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.subgroups import age_band, sex_of
from vilam3_jax.errors import UserError

FINDINGS: tuple[str, ...] = (
    NORMAL,
    "enlarged_cardiomediastinum",
    "cardiomegaly",
    "lung_opacity",
    "lung_lesion",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural_effusion",
    "pleural_other",
    "fracture",
    "support_devices",
)
# Those that VILA-M3 evaluates.
REFERENCE_FINDINGS = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural_effusion")
UNCERTAIN = ("ignore", "ones", "zeros")
_ALIASES = {"lung_opacity": ("Airspace Opacity",), NORMAL: ("No Findings",)}
_COLUMNS = column_names(FINDINGS, _ALIASES)
_FILM_COLUMNS = {"frontal": ("Frontal/Lateral",), "projection": ("AP/PA",), "sex": ("Sex",), "age": ("Age",)}
_PATIENT = re.compile(r"patient\d+/study\d+.*", re.S)
_STUDY = re.compile(r"patient\d+/study\d+")
_FRONTAL_VIEWS = ("view1_frontal.jpg", "view2_frontal.jpg", "view3_frontal.jpg")
_ROOTS = ("CheXpert-v1.0-small", "CheXpert-v1.0", ".", "CheXpert")
_TEST_LISTS = ("groundtruth.csv", "CheXpert/groundtruth.csv", "chexlocalize/CheXpert/groundtruth.csv")
_TEST_LISTS += tuple(f"{folder}test_labels.csv" for folder in ("CheXpert/", "chexlocalize/CheXpert/", ""))
# A label as one letter of a row, so that 223,414 rows stay small.
_LETTERS = {"": "-", "1": "1", "1.0": "1", "0": "0", "0.0": "0", "-1": "u", "-1.0": "u"}
_WRONG = "?"


@dataclasses.dataclass(frozen=True, slots=True)
class _Film:
    """A row of a label file.

    Attributes:
      source: the file.
      row: its line, the header being line 1.
      path: of the image, or of a study, from the patient's folder on; "" if the row has none.
      labels: a letter of `_LETTERS` for each of `FINDINGS`.
      lateral: it is a lateral film.
      projection, sex, age: cells; "" where the file does not have them.
      again: an earlier row names the same image.
    """

    source: str
    row: int
    path: str
    labels: str
    lateral: bool
    projection: str
    sex: str
    age: str
    again: bool = False


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is done with the films of a split.

    Attributes:
      folder: of the split's patients, below the source folder.
      ask: how they are asked about, and whose the labels are.
      uncertain, blank, wording: see `CheXpert.add_arguments`.
    """

    folder: str
    ask: Ask
    uncertain: str = "ignore"
    blank: str = "ignore"
    wording: str = "varied"


class CheXpert(Dataset):
    """Yes/no questions about 14 findings, or image-text pairs for contrastive training.

    Choices, where VILA-M3's files say nothing:
      - Frontal films only, as the paper's questions speak of "the frontal view"; `--views all` takes laterals
        too.
      - Training films get up to `--questions` questions; each finding is answered yes about as often as no.
      - A blank label means that the report does not mention the finding. It is then asked about only on films
        labelled "No Finding", where all findings but support devices are absent. `--blank zeros` takes all
        blanks for absent.
      - Uncertain labels (-1) are left out (U-Ignore of Irvin et al.), or taken for present or absent.
      - A test study is asked about by its first frontal film, as in the paper.

    `parity`: the questions of the test set are VILA-M3's, in its words and about its five findings. The paper
    does not train on CheXpert, and none of its defects is in these data.
    """

    has_parity = True
    name = "chexpert"
    description = "Frontal and lateral chest X-rays with 14 findings (yes/no questions; image-text pairs)"
    homepage = "https://stanfordmlgroup.github.io/competitions/chexpert/"
    citation = (
        "Irvin J, Rajpurkar P, Ko M, et al. CheXpert: a large chest radiograph dataset with uncertainty "
        "labels and expert comparison. AAAI 2019. doi:10.1609/aaai.v33i01.3301590"
    )
    licence = "Stanford University Dataset Research Use Agreement"
    access = "registered"
    instructions = (
        "Register at https://aimi.stanford.edu for CheXpert-v1.0-small or CheXpert-v1.0 and unpack it below "
        "the source folder: CheXpert-v1.0-small/{train.csv, valid.csv, train/, valid/}. For the variant "
        "'test', put groundtruth.csv of https://github.com/rajpurkarlab/cheXpert-test-set-labels there, and "
        "the folder CheXpert/test/ of CheXlocalize (https://aimi.stanford.edu, 'CheXlocalize')."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "questions": "train and validation films with yes/no questions",
        "test": "the 500 test studies, labelled by radiologists, with yes/no questions",
        "pairs": "train and validation films, each with a sentence made of its labels",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Which films, and what uncertain and blank labels stand for."""
        parser.add_argument(
            "--views", choices=("frontal", "all"), default="frontal", help="films that are taken (frontal)"
        )
        parser.add_argument(
            "--uncertain",
            choices=UNCERTAIN,
            default="ignore",
            help="what a label -1 stands for: nothing, present (ones) or absent (zeros) (ignore)",
        )
        parser.add_argument(
            "--blank",
            choices=("ignore", "zeros"),
            default="ignore",
            help="what a blank label stands for: nothing, or absent (ignore)",
        )
        parser.add_argument(
            "--questions", type=int, default=8, help="questions for one training film, at most (8)"
        )
        add_wording(parser)

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Reads train.csv and valid.csv, or the labels of the test set."""
        if not 1 <= self.options.questions <= len(FINDINGS):
            raise UserError(f"--questions {self.options.questions}: give 1 to {len(FINDINGS)}")
        if self.config == "test":
            return {"test": self._test(source)}
        train, valid = source.require(
            _below_roots("train.csv"), [*_below_roots("valid.csv"), *_below_roots("val_labels.csv")]
        )
        whole = self.options.views == "all"
        return {
            "train": self._films(source, train, ("train",), 223_414 if whole else 191_027),
            "validation": self._films(source, valid, ("valid", "val"), 234 if whole else None),
        }

    def _films(self, source: SourceFolder, name: str, folders: Sequence[str], expected: int | None) -> Split:
        (folder,) = source.require([_beside(name, folder) for folder in folders])
        films = list(_films_of(source, name, {"path": ("Path",), **_COLUMNS}, _FILM_COLUMNS))
        if self.options.views == "frontal":
            films = [film for film in films if not film.lateral]
        training = folders[0] == "train"
        # The training labels are a labeler's; three radiologists gave those of the validation films.
        ask = Ask(self.options.questions if training else 0, "labeler" if training else "radiologist")
        plan = _Plan(folder, ask, self.options.uncertain, self.options.blank, self.options.wording)
        if training:
            plan = dataclasses.replace(plan, ask=dataclasses.replace(ask, weights=_weights(films, plan)))
        make = _pair if self.config == "pairs" else _questions
        return Split(films, functools.partial(make, plan=plan), _name_of, expected)

    def _test(self, source: SourceFolder) -> Split:
        (name,) = source.require(_TEST_LISTS)
        tests = [_beside(name, "test"), "CheXpert/test", "chexlocalize/CheXpert/test"]
        (folder,) = source.require([*tests, *(f"{root}/test" for root in _ROOTS[:2])])
        studies: dict[str, _Film] = {}
        for film in _films_of(source, name, {"path": ("Study", "Path"), **_COLUMNS}, {}):
            study = _STUDY.match(film.path)
            key = study[0] if study else f"row {film.row}"
            studies.setdefault(key, dataclasses.replace(film, path=study[0] if study else ""))
        make = functools.partial(_study, plan=_Plan(folder, Ask(0, "radiologist")))
        return Split(list(studies.values()), make, _name_of, 500)


def _below_roots(name: str) -> list[str]:
    return [name if root == "." else f"{root}/{name}" for root in _ROOTS]


def _beside(file: str, name: str) -> str:
    """`name` in the folder of `file`."""
    folder = file.rpartition("/")[0]
    return f"{folder}/{name}" if folder else name


def _films_of(
    source: SourceFolder,
    name: str,
    columns: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]],
) -> Iterator[_Film]:
    seen: set[str] = set()
    for number, row in enumerate(source.table(name, columns, optional=optional), 2):
        labels = "".join(_letter(row[finding]) for finding in FINDINGS)
        view, projection, sex, age = (sys.intern(row.get(key, "").strip()) for key in _FILM_COLUMNS)
        path = _below_split(row["path"])
        words = view.lower() or path.rpartition("_")[2].lower()
        lateral = words.startswith("lateral")
        again = path in seen
        seen.add(path)
        yield _Film(name, number, path, sys.intern(labels), lateral, projection, sex, age, again)


def _letter(cell: str) -> str:
    """The letter of a label, which is "1", "1.0" or "-1.0", as the release has it."""
    return _LETTERS.get(cell.strip(), _WRONG)


def _below_split(path: str) -> str:
    """A path from the patient's folder on, "" if there is none.

    What stands before it names the release ("CheXpert-v1.0-small/train/") and may not be what is on disk.
    """
    found = _PATIENT.search(path.strip().replace("\\", "/"))
    return found[0] if found else ""


def _name_of(film: _Film) -> str:
    return f"{film.source} row {film.row}"


def _questions(film: _Film, context: Context, plan: _Plan) -> Iterator[Example]:
    states = _states(film.labels, plan)
    ask = dataclasses.replace(plan.ask, frontal=not film.lateral)
    meta, image = _meta(film, context, plan, states), _image(film, context, plan)
    yield film_example(_id(film, context), image, states, meta, context, ask)


def _pair(film: _Film, context: Context, plan: _Plan) -> Iterator[Example]:
    states, name = _states(film.labels, plan), _id(film, context)
    caption = film_caption(states, context.rng(name, "caption") if plan.wording == "varied" else None)
    meta = _meta(film, context, plan, states)
    yield pair(name, _image(film, context, plan), caption, meta, kind="pair")


def _study(film: _Film, context: Context, plan: _Plan) -> Iterator[Example]:
    states = _states(film.labels, plan)
    if context.parity:
        states = {finding: states[finding] for finding in REFERENCE_FINDINGS}
    ask = dataclasses.replace(plan.ask, reference=context.parity)
    meta = _meta(film, context, plan, states)
    yield film_example(_id(film, context), _first_frontal(film, context, plan), states, meta, context, ask)


def _states(labels: str, plan: _Plan) -> dict[str, bool | None]:
    """finding → present, absent or unknown.

    Args:
      labels: a letter for each of `FINDINGS`.
      plan: what uncertain and blank labels stand for.

    Raises:
      SkipItem: a cell is no label, or the film is labelled normal and diseased.
    """
    if _WRONG in labels:
        wrong = FINDINGS[labels.index(_WRONG)].replace("_", " ")
        raise SkipItem(f"the label {wrong} is none of 1, 0, -1 and blank")
    values: dict[str, str] = dict(zip(FINDINGS, labels, strict=True))
    normal = values[NORMAL] == "1"
    diseases = [finding for finding in FINDINGS if finding not in (NORMAL, "support_devices")]
    if normal and any(values[finding] == "1" for finding in diseases):
        raise SkipItem("labelled with no finding and with a finding")
    meanings = {"1": True, "0": False, "u": {"ones": True, "zeros": False}.get(plan.uncertain)}
    states = {finding: meanings.get(letter) for finding, letter in values.items()}
    for finding in FINDINGS:
        blank = values[finding] == "-" and finding != NORMAL
        if blank and (plan.blank == "zeros" or (normal and finding in diseases)):
            states[finding] = False
    if values[NORMAL] == "-" and any(values[finding] == "1" for finding in diseases):
        states[NORMAL] = False
    return states


def _weights(films: Sequence[_Film], plan: _Plan) -> dict[tuple[str, bool], float]:
    alike = collections.Counter(film.labels for film in films)
    known: collections.Counter[Known] = collections.Counter()
    for labels, number in alike.items():
        with contextlib.suppress(SkipItem):
            known[known_labels(_states(labels, plan))] += number
    return answer_weights(known)


def _id(film: _Film, context: Context) -> str:
    return f"{context.split}/{film.path.rpartition('.')[0] or film.path}"


def _meta(film: _Film, context: Context, plan: _Plan, states: Mapping[str, bool | None]) -> dict:
    view = film.projection.upper() or ("lateral" if film.lateral else "frontal")
    return metadata(
        context,
        modality="CXR",
        patient=film.path.partition("/")[0],
        view=view,
        sex=sex_of(film.sex),
        age_band=age_band(film.age),
        label_source=plan.ask.label_source,
        findings=[finding for finding, there in states.items() if there],
    )


def _image(film: _Film, context: Context, plan: _Plan) -> ImageRef:
    _refuse(film)
    return context.image(f"{plan.folder}/{film.path}")


def _refuse(film: _Film) -> None:
    if not film.path:
        raise SkipItem("its path names no patient and study")
    if ".." in film.path.split("/"):
        raise SkipItem("its path leaves the data root or the folder of its patient")
    if film.again:
        raise SkipItem("is listed twice")


def _first_frontal(film: _Film, context: Context, plan: _Plan) -> ImageRef:
    """The first frontal film of a study; a few studies begin with a lateral one."""
    _refuse(film)
    for view in _FRONTAL_VIEWS:
        with contextlib.suppress(SkipItem):
            return context.image(f"{plan.folder}/{film.path}/{view}")
    raise SkipItem(f"the study has none of {', '.join(_FRONTAL_VIEWS)}")
