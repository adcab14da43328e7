"""COYO-700M: web images with alt texts, as downloaded by img2dataset."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, Turn
from vilam3_jax.datasets import tar_shards
from vilam3_jax.datasets.conversations import literal, metadata, pair
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.tar_shards import Sample
from vilam3_jax.datasets.webdataset import convert_samples, shards

_PER_SHARD = 10_000
_PAIRS = 4  # per document, as in VILA's pre-training
_SIMILARITY, _WATERMARK = "clip_similarity_vitl14", "watermark_score"


class Coyo(Dataset):
    """Images with alt texts.

    The variant `document` puts four images with their texts into a sample, as VILA's pre-training does. Here
    they are neighbours in a shard, and the rest of a shard makes a shorter document. VILA's authors selected
    about 25 M images by CLIP score, but published neither list nor threshold; set it with `--min-similarity`.
    """

    name = "coyo"
    description = "Web images with alt texts (COYO-700M)."
    homepage = "https://github.com/kakaobrain/coyo-dataset"
    citation = "Byeon et al., COYO-700M: Image-Text Pair Dataset, 2022"
    licence = "CC-BY-4.0 (metadata)"
    instructions = (
        "Fetch the parquet files from https://huggingface.co/datasets/kakaobrain/coyo-700m and download the "
        "images with img2dataset: --url_col url --caption_col text --output_format webdataset "
        f'--save_additional_columns \'["id","{_SIMILARITY}","{_WATERMARK}"]\'. '
        "--source is the folder with its .tar files."
    )
    configs: Mapping[str, str] = {
        "document": "four images, each followed by its text",
        "caption": "one image and its text",
        "pair": "one image and its text for contrastive training",
    }
    expert_inputs = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--min-similarity", type=float, metavar="X", help=f"minimum {_SIMILARITY}")
        parser.add_argument("--max-watermark", type=float, metavar="X", help=f"maximum {_WATERMARK}, 0 to 1")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        given = self.options
        make = functools.partial(_make, least=given.min_similarity, most_watermark=given.max_watermark)
        per_item = _PER_SHARD // _PAIRS if self.config == "document" else _PER_SHARD
        return {"train": Split(shards(source), make, per_item=per_item)}


def _make(
    shard: str, context: Context, *, least: float | None, most_watermark: float | None
) -> Iterator[Example | Skipped]:
    def captioned(name: str, sample: Sample, record: dict[str, Any]) -> tuple[str, ImageRef, str]:
        _check_bound(record, _SIMILARITY, at_least=least)
        _check_bound(record, _WATERMARK, at_most=most_watermark)
        return name, sample.image(), tar_shards.caption(sample, record)

    pending: list[tuple[str, ImageRef, str]] = []
    for found in convert_samples(context, shard, captioned):
        if isinstance(found, Skipped):
            yield found
        elif context.config != "document":
            yield pair(*found, metadata(context, modality="", group=found[0]), context.config)
        else:
            pending.append(found)
            if len(pending) == _PAIRS:
                yield _document(pending, context)
                pending = []
    if pending:
        yield _document(pending, context)


def _check_bound(
    record: Mapping[str, Any], key: str, *, at_least: float | None = None, at_most: float | None = None
) -> None:
    if at_least is None and at_most is None:
        return
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SkipItem(f"its .json states no {key}; save that column with img2dataset")
    if at_least is not None and not value >= at_least:
        raise SkipItem(f"{key} is below {at_least}")
    if at_most is not None and not value <= at_most:
        raise SkipItem(f"{key} is above {at_most}")


def _document(pairs: Sequence[tuple[str, ImageRef, str]], context: Context) -> Example:
    """Returns a document of alternating images and texts, with the id of the first pair."""
    turns = tuple(Turn("assistant", f"{IMAGE_MARKER}{literal(text)}", True) for _, _, text in pairs)
    name = pairs[0][0]
    meta = metadata(context, modality="", group=name)
    return Example(name, "document", tuple(image for _, image, _ in pairs), turns, meta=meta)
