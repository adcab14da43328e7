"""MIMIC-CXR reports: films of MIMIC-CXR-JPG with sections of the reports of MIMIC-CXR."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.mimic_cxr import (
    FRONTAL,
    IMAGES,
    JPG_INSTRUCTIONS,
    Film,
    MimicDataset,
    alternatives,
    film_image,
    films_of,
    jpg_folder,
    jpg_tables,
    number_of,
    required,
    row_of,
    study_path,
    views_of,
)
from vilam3_jax.datasets.report_examples import CONFIGS, MAX_REPORT, Pools, pools_of, report_example
from vilam3_jax.datasets.report_sections import sections_of
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

_FOLDERS = (
    "",
    "mimic-cxr-reports",
    "mimic-cxr/2.1.0",
    "mimic-cxr/2.0.0",
    "mimic-cxr",
    "physionet.org/files/mimic-cxr/2.1.0",
    "physionet.org/files/mimic-cxr/2.0.0",
)
_TARGETS = {
    "findings": ("findings",),
    "impression": ("impression",),
    "findings_impression": ("findings", "impression"),
}
_PROBED = 500  # studies in which the first report is looked for


class Item(NamedTuple):
    """A film and its report.

    Attributes:
      row: of the split table.
      film: its ids.
      sections: the texts that are asked for, where a table has them; None: they are in the report's file.
    """

    row: int
    film: Film
    sections: tuple[str, ...] | None


class MimicCxrReports(MimicDataset):
    """One record for each frontal film, with the report of its study.

    If the source has `mimic_cxr_sectioned.csv`, its sections are used; otherwise `report_sections` finds them
    in the text files. A sentence with a masked word (`___`) is left out of the target: a model would learn to
    write the mask. `parity` takes the wording of "pooled" from the test reports, as the reference does.
    """

    has_parity = True
    name = "mimic_cxr_reports"
    description = "Frontal chest films of MIMIC-CXR with the findings or the impression of their reports."
    configs: ClassVar[Mapping[str, str]] = CONFIGS
    instructions = (
        f"{JPG_INSTRUCTIONS}: mimic-cxr-2.0.0-{{split,metadata}}.csv.gz. From "
        "https://physionet.org/content/mimic-cxr/ (credentialed access): mimic-cxr-reports.zip, unpacked "
        "into the same folder (files/p10/p10…/s5….txt) or into mimic-cxr-reports/; or your "
        "mimic_cxr_sectioned.csv."
    )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares --target."""
        super().add_arguments(parser)
        parser.add_argument(
            "--target", choices=tuple(_TARGETS), default="findings", help="sections that are learned"
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Joins films with reports; with "pooled", reads all reports of the training and the test split."""
        table, views = required(source, *jpg_tables("split", "metadata"))
        films = films_of(source, table, views_of(source, views))
        heads = _TARGETS[self.options.target]
        sectioned = source.find(*alternatives(_FOLDERS, "mimic_cxr_sectioned.csv"))
        folder, known = "", None
        if sectioned:
            known = _sections_in(source, sectioned, heads)
        else:
            folder = _reports_folder(source, films)
        items = {
            name: [Item(f.row, f, None if known is None else known.get(f.study, ())) for f in of_split]
            for name, of_split in films.items()
        }
        read = functools.partial(_sections, folder=folder, heads=heads)
        pools = Pools({}, {})
        if self.config == "pooled":
            of_source = functools.partial(read, file_of=lambda path: source.root / path)
            pools = pools_of({name: _texts(items.get(name, ()), of_source) for name in ("train", "test")})
        make = functools.partial(
            _examples,
            folder=jpg_folder(source),
            read=read,
            heads=heads,
            pools=pools,
            views=self.options.views,
        )
        return {
            name: Split(of_split, make, functools.partial(row_of, table), IMAGES[name])
            for name, of_split in items.items()
        }


def _sections_in(source: SourceFolder, table: str, heads: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Study → the sections asked for, from `mimic_cxr_sectioned.csv`."""
    rows = source.table(table, {"study": ("study", "study_id"), **{head: (head,) for head in heads}})
    return {number_of(row["study"], "s"): tuple(row[head] for head in heads) for row in rows}


def _reports_folder(source: SourceFolder, films: Mapping[str, Sequence[Film]]) -> str:
    """The folder with the text files; a study in thousands may lack its own.

    Raises:
      UserError: none of the first studies has one anywhere.
    """
    first = [film for of_split in films.values() for film in of_split if not film.problem][:_PROBED]
    for film in first:
        for folder in _FOLDERS:
            if source.find(f"{folder}/{study_path(film.subject, film.study)}.txt".lstrip("/")):
                return folder
    raise UserError(
        f"{source.root}: no report (files/pNN/pNNNNNNNN/sNNNNNNNN.txt) of the first {len(first)} films is "
        f"there, and no mimic_cxr_sectioned.csv. {MimicCxrReports.instructions}"
    )


def _sections(
    item: Item, *, file_of: Callable[[str], paths.PathLike], folder: str, heads: Sequence[str]
) -> tuple[str, ...]:
    """The raw texts of an item's sections, "" for one that the report lacks."""
    if item.sections is not None:
        if not item.sections:
            raise SkipItem("its study is not in the table of sections")
        return item.sections
    path = f"{folder}/{study_path(item.film.subject, item.film.study)}.txt".lstrip("/")
    file = file_of(path)
    if not paths.exists(file):
        raise SkipItem("its report is missing")
    try:
        report = paths.read_bytes(file, MAX_REPORT).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SkipItem("its report is no UTF-8 text") from None
    except UnavailableError:
        raise
    except UserError:  # the message names the path, and so the patient
        raise SkipItem(f"its report cannot be read; up to {MAX_REPORT} bytes are") from None
    found = sections_of(report)
    return tuple(getattr(found, head) for head in heads)


def _texts(items: Sequence[Item], read: Callable[[Item], tuple[str, ...]]) -> Iterator[str]:
    """The raw sections of each study once."""
    seen: set[str] = set()
    for item in items:
        if item.film.problem or item.film.study in seen:
            continue
        seen.add(item.film.study)
        try:
            yield from (text for text in read(item) if len(text) <= MAX_REPORT)
        except SkipItem:  # said when the item's turn comes
            continue


def _examples(
    item: Item,
    context: Context,
    *,
    folder: str,
    read: Callable[..., tuple[str, ...]],
    heads: Sequence[str],
    pools: Pools,
    views: str,
) -> Iterator[Example]:
    if not item.film.problem and views == "frontal" and item.film.view not in FRONTAL:
        return
    if item.film.problem:
        raise SkipItem(item.film.problem)
    raw = read(item, file_of=context.file)
    yield report_example(item.film, film_image(context, folder, item.film), raw, heads, context, pools)
