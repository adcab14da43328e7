"""Reports of R2Gen and DCL: `mimic_annotation.json` with films of MIMIC-CXR-JPG."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from vilam3_jax.data.examples import Example, path_problem
from vilam3_jax.datasets import mimic_cxr
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.mimic_cxr import FRONTAL, Film, MimicDataset, number_of, split_named
from vilam3_jax.datasets.report_examples import CONFIGS, MAX_REPORT, Pools, pools_of, report_example
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_NAMES = ("mimic_annotation.json", "mimic_cxr/annotation.json", "annotation.json")
_IMAGES = (*(f"{f}/files".lstrip("/") for f in mimic_cxr.JPG_FOLDERS), "mimic_cxr/images", "images")
_ITEMS = {"train": 270_790, "validation": 2_130, "test": 3_858}
_SUBJECT, _STUDY = re.compile(r"(?:^|/)p(\d{3,})/"), re.compile(r"(?:^|/)s(\d{2,})/")
_DICOM = re.compile(r"(?:^|/)([0-9a-f]{8}(?:-[0-9a-f]{8}){4})\.[^/.]+\Z")


class Item(NamedTuple):
    """A film and its report."""

    row: int  # in its list of the file
    film: Film
    path: str  # of the image
    report: str


class MimicAnnotation(MimicDataset):
    """The report set of the VILA-M3 paper, whose own version of the text was not released.

    - "pooled" is the default, since the paper rewrote its reports with a pool of sentences. The pool consists
      of frequent sentences of the training split instead of a language model's. With `parity` it is built
      from the test split, as in the reference.
    - All films are used: 270,790 for training match the paper's 270,000. `--views frontal` is the filter of
      its evaluation; it needs mimic-cxr-2.0.0-metadata.csv.gz.
    - The request is the paper's, "Describe the image in detail."
    """

    has_parity = True
    name = "mimic_annotation"
    description = "Findings of MIMIC-CXR reports selected by R2Gen and DCL, with one film each."
    configs: ClassVar[Mapping[str, str]] = {name: CONFIGS[name] for name in ("pooled", "clean", "pairs")}
    instructions = (
        "mimic_annotation.json from the Google Drive folder of https://github.com/mlii0117/DCL, or "
        "annotation.json of https://github.com/cuhksz-nlp/R2Gen (text derived from MIMIC-CXR: the same "
        f"terms). {mimic_cxr.JPG_INSTRUCTIONS}."
    )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--views`, all by default."""
        super().add_arguments(parser)
        parser.set_defaults(views="all")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        frontal = self.options.views == "frontal"
        tables = mimic_cxr.jpg_tables("metadata")
        name, folder, *table = mimic_cxr.required(source, _NAMES, _IMAGES, *(tables if frontal else ()))
        metadata = table[0] if table else source.find(*tables[0])
        items = _items(source, name, mimic_cxr.views_of(source, metadata) if metadata else {})
        pools = Pools({}, {})
        if self.config == "pooled":
            usable = {n: (i.report for i in of_split if not i.film.problem) for n, of_split in items.items()}
            pools = pools_of(usable)
        make = functools.partial(_examples, folder=folder, pools=pools, frontal=frontal)
        return {
            split: Split(
                of_split, make, functools.partial(mimic_cxr.row_of, f"{name} {split}"), _ITEMS[split]
            )
            for split, of_split in items.items()
        }


def _items(source: SourceFolder, name: str, views: Mapping[str, str]) -> dict[str, list[Item]]:
    content = source.json(name)
    lists = {
        split_named(key): value
        for key, value in (content.items() if isinstance(content, dict) else ())
        if split_named(key) and isinstance(value, list)
    }
    if not lists:
        raise UserError(f"{source.root / name}: has no list under train, val or test; download it again")
    taken: set[str] = set()
    return mimic_cxr.one_split_per_patient(
        {
            split: [_item(row, value, views, taken) for row, value in enumerate(values, 1)]
            for split, values in lists.items()
        }
    )


def _item(row: int, value: Any, views: Mapping[str, str], taken: set[str]) -> Item:
    """Reads an item; errors become the problem of its film."""
    if not isinstance(value, dict):
        return Item(row, Film(row, "", "", "", problem=f"is a {type(value).__name__}, not an object"), "", "")
    path, report = value.get("image_path"), value.get("report")
    if isinstance(path, list):
        path = path[0] if len(path) == 1 else None
    named = path if isinstance(path, str) and path.strip() else ""
    subject = number_of(value.get("subject_id"), "p") or _found(_SUBJECT, named)
    study = number_of(value.get("study_id"), "s") or _found(_STUDY, named)
    dicom = value.get("id")
    dicom = dicom.strip() if isinstance(dicom, str) else ""
    problem = mimic_cxr.film_problem(subject, study, dicom) or _problem(dicom in taken, named, report)
    stated = ((_SUBJECT, subject), (_STUDY, study), (_DICOM, dicom))
    if not problem and any(_found(pattern, named) not in ("", known) for pattern, known in stated):
        problem = "its image_path is of another film than its ids"
    taken.add(dicom)
    film = Film(row, subject, study, dicom, views.get(dicom, ""), problem)
    return Item(row, film, named, report if isinstance(report, str) and not problem else "")


def _problem(is_taken: bool, path: str, report: Any) -> str:
    if is_taken:
        return "its id is a duplicate"
    if not path:
        return "its image_path is not a path or a list of one path"
    if path_problem(path):
        return "its image_path is not relative to the image folder"
    if not isinstance(report, str):
        return f"its report is a {type(report).__name__}, not text"
    if len(report) > MAX_REPORT:
        return f"its report has more than {MAX_REPORT} characters"
    return "" if report.strip() else "its report is empty"


def _found(pattern: re.Pattern[str], path: str) -> str:
    found = pattern.search(path)
    return found[1] if found else ""


def _examples(item: Item, context: Context, *, folder: str, pools: Pools, frontal: bool) -> Iterator[Example]:
    if item.film.problem:
        raise SkipItem(item.film.problem)
    if frontal and item.film.view not in FRONTAL:
        return
    image = mimic_cxr.film_image(context, folder, item.film, item.path)
    yield report_example(item.film, image, (item.report,), ("report",), context, pools)
