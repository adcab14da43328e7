"""CheXpert: Stanford's chest films with labels from reports, and 500 test studies read by radiologists.

Layout: v1.0 and v1.0-small of Stanford AIMI, test images of CheXlocalize, and test labels of
github.com/rajpurkarlab/cheXpert-test-set-labels. Labels: Irvin et al., AAAI 2019.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import chest_findings
from vilam3_jax.datasets.chest_findings import NORMAL, FilmDataset, FilmOptions, States
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.source_files import SourceFolder

FINDINGS = chest_findings.CHEXPERT_FINDINGS
# Findings evaluated by VILA-M3.
REFERENCE_FINDINGS = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural_effusion")
UNCERTAIN = ("ignore", "ones", "zeros")
_FILM_COLUMNS = {"frontal": ("Frontal/Lateral",), "projection": ("AP/PA",), "sex": ("Sex",), "age": ("Age",)}
_PATIENT = re.compile(r"patient\d+/study\d+.*", re.S)
_STUDY = re.compile(r"patient\d+/study\d+")
_NO_STUDY = "its path names no patient and study"
_FRONTAL_VIEWS = ("view1_frontal.jpg", "view2_frontal.jpg", "view3_frontal.jpg")
_ROOTS = ("CheXpert-v1.0-small", "CheXpert-v1.0", ".", "CheXpert")
_TEST_LISTS = ("groundtruth.csv", "CheXpert/groundtruth.csv", "chexlocalize/CheXpert/groundtruth.csv")
_TEST_LISTS += tuple(f"{folder}test_labels.csv" for folder in ("CheXpert/", "chexlocalize/CheXpert/", ""))
# One letter per label keeps 223,414 rows small.
_LETTERS = {"": "-", "1": "1", "1.0": "1", "0": "0", "0.0": "0", "-1": "u", "-1.0": "u"}
_INVALID = "?"


@dataclasses.dataclass(frozen=True, slots=True)
class _Film:
    source: str
    row: int  # line of the file; the header is line 1
    path: str  # of the image or study, starting at the patient folder
    labels: str  # a letter of `_LETTERS` for each of `FINDINGS`
    lateral: bool
    projection: str
    sex: str
    age: str
    problem: str = ""  # reason to skip the film


class CheXpert(FilmDataset):
    """Yes/no questions about 14 findings, or image-text pairs for contrastive training.

    Where VILA-M3's files leave it open:
      - Only frontal films are used, since the paper's questions mention "the frontal view"; `--views all`
        adds lateral ones.
      - Training films get up to `--questions` questions; answers are balanced for each finding.
      - A blank label means that the report does not mention the finding. It is asked about only on films
        labelled "No Finding", where all findings but support devices are absent. With `--blank zeros`, blank
        means absent.
      - Uncertain labels (-1) are ignored (U-Ignore of Irvin et al.), or count as present or absent.
      - A test study is represented by its first frontal film, as in the paper.

    `parity`: test questions have VILA-M3's wording and its five findings. The paper does not train on
    CheXpert, so none of its defects apply.
    """

    has_parity = True
    findings = FINDINGS
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
        "pairs": "train and validation films, each with a sentence generated from its labels",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--views", choices=("frontal", "all"), default="frontal", help="films to use (default: frontal)"
        )
        parser.add_argument(
            "--uncertain",
            choices=UNCERTAIN,
            default="ignore",
            help="meaning of label -1: unknown, present (ones) or absent (zeros) (default: ignore)",
        )
        parser.add_argument(
            "--blank",
            choices=("ignore", "zeros"),
            default="ignore",
            help="meaning of a blank label: unknown, or absent (default: ignore)",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        if self.config == "test":
            return {"test": self._test(source)}
        train, valid = source.require(
            _below_roots("train.csv"), [*_below_roots("valid.csv"), *_below_roots("val_labels.csv")]
        )
        all_views = self.options.views == "all"
        return {
            "train": self._films(source, train, ("train",), 223_414 if all_views else 191_027),
            "validation": self._films(source, valid, ("valid", "val"), 234 if all_views else None),
        }

    def _films(self, source: SourceFolder, name: str, folders: Sequence[str], expected: int | None) -> Split:
        (folder,) = source.require([_beside(name, folder) for folder in folders])
        films = list(_read(source, name, ("Path",), _FILM_COLUMNS))
        if self.options.views == "frontal":
            films = [film for film in films if not film.lateral]
        states = functools.partial(_states, uncertain=self.options.uncertain, blank=self.options.blank)
        if folders[0] == "train":
            weights = chest_findings.answer_weights((film.labels for film in films), states)
            options = self.film_options("labeler", weights)
        else:  # labelled by three radiologists
            options = self.film_options("radiologist")
        make = functools.partial(_make, folder=folder, states_of=states, options=options)
        return Split(films, make, chest_findings.film_name, expected)

    def _test(self, source: SourceFolder) -> Split:
        (name,) = source.require(_TEST_LISTS)
        tests = [_beside(name, "test"), "CheXpert/test", "chexlocalize/CheXpert/test"]
        (folder,) = source.require([*tests, *(f"{root}/test" for root in _ROOTS[:2])])
        studies: dict[str, _Film] = {}
        for film in _read(source, name, ("Study", "Path"), {}):
            study = _STUDY.match(film.path)
            key, problem = (study[0], "") if study else (f"row {film.row}", _NO_STUDY)
            studies.setdefault(key, dataclasses.replace(film, path=key, problem=problem))
        options = self.film_options("radiologist")
        make = functools.partial(_make, folder=folder, states_of=_states, options=options)
        return Split(list(studies.values()), make, chest_findings.film_name, 500)


def _below_roots(name: str) -> list[str]:
    return [name if root == "." else f"{root}/{name}" for root in _ROOTS]


def _beside(file: str, name: str) -> str:
    folder = file.rpartition("/")[0]
    return f"{folder}/{name}" if folder else name


def _read(
    source: SourceFolder, name: str, path_columns: Sequence[str], film_columns: Mapping[str, Sequence[str]]
) -> Iterator[_Film]:
    seen: set[str] = set()
    columns = {"path": path_columns, **chest_findings.CHEXPERT_COLUMNS}
    for number, row in enumerate(source.table(name, columns, optional=film_columns), 2):
        labels = "".join(_LETTERS.get(row[finding].strip(), _INVALID) for finding in FINDINGS)
        view, projection, sex, age = (sys.intern(row.get(key, "").strip()) for key in _FILM_COLUMNS)
        # The part before the patient names the release ("CheXpert-v1.0-small/train/") and may not exist.
        found = _PATIENT.search(row["path"].strip().replace("\\", "/"))
        path = found[0] if found else ""
        problem = "" if path else _NO_STUDY
        if ".." in path.split("/"):
            problem = "its path leaves the data root or the folder of its patient"
        elif path in seen:
            problem = problem or "is listed twice"
        seen.add(path)
        lateral = (view.lower() or path.rpartition("_")[2].lower()).startswith("lateral")
        yield _Film(name, number, path, sys.intern(labels), lateral, projection, sex, age, problem)


def _make(
    film: _Film, context: Context, *, folder: str, states_of: Callable[[str], States], options: FilmOptions
) -> Iterator[Example]:
    states, path = states_of(film.labels), f"{folder}/{film.path}"
    if film.problem:
        raise SkipItem(film.problem)
    if context.config == "test":
        image = _first_frontal(context, path)
        if context.parity:
            states = {finding: states[finding] for finding in REFERENCE_FINDINGS}
            options = dataclasses.replace(options, reference=True)
    else:
        image = context.image(path)
        options = dataclasses.replace(options, frontal=not film.lateral)
    patient = film.path.partition("/")[0]
    view = film.projection.upper() or ("lateral" if film.lateral else "frontal")
    meta = chest_findings.film_meta(context, film, states, options, patient=patient, view=view)
    name = f"{context.split}/{film.path.rpartition('.')[0] or film.path}"
    yield chest_findings.film_record(name, image, states, meta, context, options)


def _states(labels: str, *, uncertain: str = "ignore", blank: str = "ignore") -> States:
    """Converts letters, one for each of `FINDINGS`, to states."""
    if _INVALID in labels:
        finding = FINDINGS[labels.index(_INVALID)].replace("_", " ")
        raise SkipItem(f"the label {finding} is none of 1, 0, -1 and blank")
    values: dict[str, str] = dict(zip(FINDINGS, labels, strict=True))
    normal = values[NORMAL] == "1"
    diseases = [finding for finding in FINDINGS if finding not in (NORMAL, "support_devices")]
    diseased = any(values[finding] == "1" for finding in diseases)
    if normal and diseased:
        raise SkipItem("labelled with no finding and with a finding")
    meanings = {"1": True, "0": False, "u": {"ones": True, "zeros": False}.get(uncertain)}
    states = {finding: meanings.get(letter) for finding, letter in values.items()}
    for finding in FINDINGS[1:]:
        if values[finding] == "-" and (blank == "zeros" or (normal and finding in diseases)):
            states[finding] = False
    if values[NORMAL] == "-" and diseased:
        states[NORMAL] = False
    return states


def _first_frontal(context: Context, folder: str) -> ImageRef:
    """Returns the first frontal film of a study; a few studies begin with a lateral one."""
    for view in _FRONTAL_VIEWS:
        with contextlib.suppress(SkipItem):
            return context.image(f"{folder}/{view}")
    raise SkipItem(f"the study has none of {', '.join(_FRONTAL_VIEWS)}")
