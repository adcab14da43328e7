"""Shared code of datasets of published figures with captions: PMC-OA, ROCO and ROCOv2."""

from __future__ import annotations

import argparse
import functools
import posixpath
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets.conversations import metadata, pair, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.rows import Row, below, name_of, rows_of

# UMLS concepts of imaging modalities.
_MODALITIES = {
    "C0040405": "CT",
    "C0024485": "MR",
    "C1306645": "XR",
    "C0041618": "US",
    "C0032743": "PET",
    "C0002978": "ANGIOGRAPHY",
}
_CHEST = "C0817096"


class Figure(NamedTuple):
    """A figure as the source describes it; values are not validated."""

    folder: str  # of the images, below the root
    file: Any
    caption: Any
    concepts: tuple[str, ...] = ()  # of UMLS
    modality: str = ""
    more: dict[str, Any] | None = None  # further metadata


class FigureDataset(Dataset):
    """Figures with captions, or pairs for contrastive training with `--pairs`."""

    expert_inputs = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares `--pairs`."""
        parser.add_argument(
            "--pairs", action="store_true", help="make pairs for contrastive training instead of captions"
        )

    def figure_split(
        self,
        file: str,
        figures: Iterable[tuple[int, Figure | ValueError]],
        taken: set[str],
        expected: int | None = None,
    ) -> Split:
        """Returns a split of the numbered figures of a file; ids are their file names without suffix."""
        kind = "pair" if self.options.pairs else "caption"
        rows = rows_of(file, figures, lambda f: posixpath.basename(f.file).rpartition(".")[0], taken=taken)
        return Split(rows, functools.partial(_make, kind=kind), name_of, expected)


def _make(row: Row, context: Context, kind: str) -> Iterator[Example]:
    if isinstance(row.values, ValueError):
        raise SkipItem(f"the line {row.values}")
    figure: Figure = row.values
    caption = text_of(figure.caption, "caption").strip()
    path = below(figure.folder, figure.file)
    meta = metadata(
        context,
        modality=figure.modality,
        group=path,
        concepts=list(figure.concepts) or None,
        **(figure.more or {}),
    )
    yield pair(row.id, context.image(path), caption, meta, kind)


def modality_of(concepts: Collection[str]) -> str:
    """Returns the modality code for UMLS concepts; "" unless they name exactly one modality.

    >>> modality_of(["C1306645", "C0817096"]), modality_of(["C0040405"]), modality_of([])
    ('CXR', 'CT', '')
    """
    found = {_MODALITIES[concept] for concept in concepts if concept in _MODALITIES}
    if len(found) != 1:
        return ""
    modality = found.pop()
    return "CXR" if modality == "XR" and _CHEST in concepts else modality
