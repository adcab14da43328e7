"""Figures of articles with their captions: what PMC-OA, ROCO and ROCOv2 have in common."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets.conversations import metadata, pair, text_of
from vilam3_jax.datasets.dataset import Context, SkipItem
from vilam3_jax.datasets.rows import Row, below

# Concepts of UMLS that say how an image was made.
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
    """What a source says of one figure; values as it has them.

    Attributes:
      folder: of the images, below the root.
      file: the image's name in it.
      caption: as published.
      concepts: of UMLS.
      modality: the project's word; "" where nobody says.
      more: plain values that are kept as metadata.
    """

    folder: str
    file: Any
    caption: Any
    concepts: tuple[str, ...] = ()
    modality: str = ""
    more: dict[str, Any] | None = None


def add_pairs_option(parser: argparse.ArgumentParser) -> None:
    """Declares `--pairs`."""
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="make pairs for contrastive training; by default captions, which a model learns to write",
    )


def make(row: Row, context: Context, kind: str) -> Iterator[Example]:
    """One figure with its caption; `kind` is "caption" or "pair"."""
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
    """The project's word for the modality among concepts of UMLS; "" where none or several are named.

    >>> modality_of(["C1306645", "C0817096"]), modality_of(["C0040405"]), modality_of([])
    ('CXR', 'CT', '')
    """
    found = {_MODALITIES[concept] for concept in concepts if concept in _MODALITIES}
    if len(found) != 1:
        return ""
    modality = found.pop()
    return "CXR" if modality == "XR" and _CHEST in concepts else modality
