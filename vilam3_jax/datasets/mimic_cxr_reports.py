"""MIMIC-CXR reports: films of MIMIC-CXR-JPG with sections of the reports of MIMIC-CXR."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import mimic_cxr
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.mimic_cxr import FRONTAL, Film, MimicDataset, number_of, study_path
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
_PROBED = 500  # studies probed for the folder of reports


class Item(NamedTuple):
    """A film and its report."""

    row: int  # of the split table
    film: Film
    sections: tuple[str, ...] | None  # target sections from a table; None to read the report file


class MimicCxrReports(MimicDataset):
    """Frontal films, each with the report of its study.

    Sections come from `mimic_cxr_sectioned.csv` if present, otherwise `report_sections` finds them in the
    report files. Sentences with a masked word (`___`) are removed from the target, so that a model does not
    learn to write masks. With `parity`, the wording of "pooled" comes from test reports, as in the reference.
    """

    has_parity = True
    name = "mimic_cxr_reports"
    description = "Frontal chest films of MIMIC-CXR with the findings or the impression of their reports."
    configs: ClassVar[Mapping[str, str]] = CONFIGS
    instructions = (
        f"{mimic_cxr.JPG_INSTRUCTIONS}: mimic-cxr-2.0.0-{{split,metadata}}.csv.gz. From "
        "https://physionet.org/content/mimic-cxr/ (credentialed access): mimic-cxr-reports.zip, unpacked "
        "into the same folder (files/p10/p10…/s5….txt) or into mimic-cxr-reports/; or your "
        "mimic_cxr_sectioned.csv."
    )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--target", choices=tuple(_TARGETS), default="findings", help="target sections")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Joins films with reports; "pooled" reads all train and test reports."""
        table, views = mimic_cxr.required(source, *mimic_cxr.jpg_tables("split", "metadata"))
        films = mimic_cxr.films_of(source, table, mimic_cxr.views_of(source, views))
        heads = _TARGETS[self.options.target]
        sectioned = source.find(*mimic_cxr.alternatives(_FOLDERS, "mimic_cxr_sectioned.csv"))
        folder, known = "", None
        if sectioned:
            rows = source.table(
                sectioned, {"study": ("study", "study_id"), **{head: (head,) for head in heads}}
            )
            known = {number_of(row["study"], "s"): tuple(row[head] for head in heads) for row in rows}
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
            folder=mimic_cxr.jpg_folder(source),
            read=read,
            heads=heads,
            pools=pools,
            views=self.options.views,
        )
        name_of = functools.partial(mimic_cxr.row_of, table)
        return {
            name: Split(of_split, make, name_of, mimic_cxr.IMAGES[name]) for name, of_split in items.items()
        }


def _reports_folder(source: SourceFolder, films: Mapping[str, Sequence[Film]]) -> str:
    """Finds the folder of the report files; single studies may lack a report."""
    first = [film for of_split in films.values() for film in of_split if not film.problem][:_PROBED]
    for film in first:
        for folder in _FOLDERS:
            if source.find(f"{folder}/{study_path(film.subject, film.study)}.txt".lstrip("/")):
                return folder
    raise UserError(
        f"{source.root}: neither mimic_cxr_sectioned.csv nor a report of the first {len(first)} films "
        f"(files/pNN/pNNNNNNNN/sNNNNNNNN.txt). {MimicCxrReports.instructions}"
    )


def _sections(
    item: Item, *, file_of: Callable[[str], paths.PathLike], folder: str, heads: Sequence[str]
) -> tuple[str, ...]:
    """Returns the raw target sections of an item, "" for missing ones."""
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
        raise SkipItem("its report is not UTF-8 text") from None
    except UnavailableError:
        raise
    except UserError:  # its message contains the path, and so the patient
        raise SkipItem(f"its report cannot be read; up to {MAX_REPORT} bytes are") from None
    found = sections_of(report)
    return tuple(found.get(head, "") for head in heads)


def _texts(items: Sequence[Item], read: Callable[[Item], tuple[str, ...]]) -> Iterator[str]:
    """Yields the raw sections of each study once."""
    seen: set[str] = set()
    for item in items:
        if item.film.problem or item.film.study in seen:
            continue
        seen.add(item.film.study)
        try:
            yield from (text for text in read(item) if len(text) <= MAX_REPORT)
        except SkipItem:  # reported when the item is converted
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
    image = mimic_cxr.film_image(context, folder, item.film)
    yield report_example(item.film, image, raw, heads, context, pools)
