"""COYO-700M: pictures of the web with their alternative texts, as img2dataset downloads them."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, Turn
from vilam3_jax.datasets import tar_shards
from vilam3_jax.datasets.conversations import literal, metadata, pair
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.webdataset import shards
from vilam3_jax.errors import UserError

_PER_SHARD = 10_000
_PAIRS = 4  # of one document, as in VILA's pre-training
_SIMILARITY, _WATERMARK = "clip_similarity_vitl14", "watermark_score"


class Coyo(Dataset):
    """Pictures with alternative texts.

    VILA's pre-training shows four pictures with their texts in one sample: the variant `document`. Here the
    four are neighbours in a shard; what remains at its end makes a shorter document. The maintainers chose
    about 25 M pictures by CLIP score, but published neither the list nor the bound: `--min-similarity` is it.
    """

    name = "coyo"
    description = "Pictures of the web with alternative texts (COYO-700M)."
    homepage = "https://github.com/kakaobrain/coyo-dataset"
    citation = "Byeon et al., COYO-700M: Image-Text Pair Dataset, 2022"
    licence = "CC-BY-4.0 (metadata)"
    instructions = (
        "Fetch the parquet files from https://huggingface.co/datasets/kakaobrain/coyo-700m and download the "
        "pictures with img2dataset: --url_col url --caption_col text --output_format webdataset "
        f'--save_additional_columns \'["id","{_SIMILARITY}","{_WATERMARK}"]\'. '
        "--source is the folder with its .tar files."
    )
    configs: Mapping[str, str] = {
        "document": "four pictures, each followed by its text",
        "caption": "one picture and its text",
        "pair": "one picture and its text for contrastive training",
    }
    expert_inputs = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares the bounds of what is used."""
        parser.add_argument(
            "--min-similarity", type=float, metavar="X", help=f"least {_SIMILARITY} of a picture and its text"
        )
        parser.add_argument(
            "--max-watermark", type=float, metavar="X", help=f"largest {_WATERMARK} of a picture, 0 to 1"
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Lists the shards."""
        make = functools.partial(
            _make, least=self.options.min_similarity, most_watermark=self.options.max_watermark
        )
        per_item = _PER_SHARD // _PAIRS if self.config == "document" else _PER_SHARD
        return {"train": Split(shards(source), make, per_item=per_item)}


def _make(
    shard: str, context: Context, *, least: float | None, most_watermark: float | None
) -> Iterator[Example | Skipped]:
    waiting: list[tuple[str, ImageRef, str]] = []
    for sample in tar_shards.samples(context, shard):
        if isinstance(sample, Skipped):
            yield sample
            continue
        name = f"{os.path.splitext(shard)[0]}/{sample.key}"
        try:
            if sample.problem:
                raise SkipItem(sample.problem)
            record = sample.record()
            _check_bound(record, _SIMILARITY, at_least=least)
            _check_bound(record, _WATERMARK, at_most=most_watermark)
            found = (name, sample.picture(), tar_shards.caption(sample, record))
        except (SkipItem, UserError) as reason:
            yield Skipped(f"{shard}:{sample.key}", str(reason))
            continue
        if context.config != "document":
            meta = metadata(context, modality="", group=name)
            yield pair(*found, meta, context.config)
            continue
        waiting.append(found)
        if len(waiting) == _PAIRS:
            yield _document(waiting, context)
            waiting = []
    if waiting:
        yield _document(waiting, context)


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
    """Pictures and texts in turn; the document has the name of its first pair."""
    turns = tuple(Turn("assistant", f"{IMAGE_MARKER}{literal(text)}", True) for _, _, text in pairs)
    name = pairs[0][0]
    meta = metadata(context, modality="", group=name)
    return Example(name, "document", tuple(image for _, image, _ in pairs), turns, meta=meta)
