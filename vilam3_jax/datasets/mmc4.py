"""MMC4: web pages with images between sentences, in the versions that are still available."""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, Turn
from vilam3_jax.datasets import record_files
from vilam3_jax.datasets.conversations import literal, metadata
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.image_files import ImageFiles, find_image_files
from vilam3_jax.datasets.record_files import Place
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_PATTERNS = ("docs_*shard_*.jsonl", "docs_*shard_*.jsonl.zip")
_NUMBER = re.compile(r"shard_(\d+)")
_PER_SHARD = 200
_MAX_IMAGES = 6  # per sample in VILA's pre-training
_MAX_SENTENCES = 100_000


class Mmc4(Dataset):
    """Documents of interleaved images and text.

    Only the sets without faces, such as mmc4-core-ff, are still available. An image precedes the sentence it
    matches; several images of a sentence keep their order. Images that are missing or below
    `--min-similarity` are left out, and documents without images are skipped. VILA uses at most six images of
    a document without specifying which; here, the most similar ones.
    """

    name = "mmc4"
    description = "Web pages with images between sentences (MMC4 without faces)."
    homepage = "https://github.com/allenai/mmc4"
    citation = "Zhu et al., Multimodal C4, NeurIPS Datasets and Benchmarks 2023"
    licence = "ODC-BY"
    instructions = (
        "Fetch the shards (docs_..._shard_<N>_v3.jsonl, also as .zip) of "
        "https://huggingface.co/datasets/jmhessel/mmc4-core-ff, and download each `raw_url` to "
        "images/<image_name>, or to images/<N>/<image_name>."
    )
    expert_inputs = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--min-similarity", type=float, default=0.0, metavar="X", help="minimum matched_sim of an image")
        add("--max-images", type=int, default=_MAX_IMAGES, metavar="N", help="maximum images per document")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        if self.options.max_images < 1:
            raise UserError(f"--max-images {self.options.max_images}: give 1 or more")
        patterns = [folder + pattern for pattern in _PATTERNS for folder in ("", "docs/")]
        found = [name for pattern in patterns for name in source.glob(pattern)]
        # Ignores archives that were unpacked in place.
        found = [n for n in found if not (n.endswith(".zip") and n.removesuffix(".zip") in found)]
        if not found:
            source.require("docs_..._shard_<N>_v3.jsonl")
        make = functools.partial(
            _make,
            image_files=find_image_files(source, ["images"], ["images.zip"]),
            least=self.options.min_similarity,
            most=self.options.max_images,
        )
        return {"train": Split(sorted(found), make, per_item=_PER_SHARD)}


def _make(
    shard: str, context: Context, *, image_files: ImageFiles, least: float, most: int
) -> Iterator[Example | Skipped]:
    number = _NUMBER.search(shard)
    folder = number[1] if number else ""
    stem = os.path.basename(shard).split(".")[0]
    for place, data in _lines(context, shard):
        try:
            yield _document(f"{stem}/{place.row}", data, context, image_files, folder, least, most)
        except (SkipItem, record_files.NotRecord) as reason:
            yield Skipped(f"{shard} record {place.row}", str(reason))


def _lines(context: Context, shard: str) -> Iterator[tuple[Place, bytes]]:
    """Yields the lines of a shard, which may be zipped."""
    path = context.file(shard)
    try:
        with path.open("rb") as file:
            if not shard.endswith(".zip"):
                yield from record_files.lines(file)
                return
            with zipfile.ZipFile(file) as archive:
                names = (info for info in archive.infolist() if info.filename.endswith(".jsonl"))
                # macOS adds `__MACOSX/._NAME` for each member.
                members = [info for info in names if not os.path.basename(info.filename).startswith("._")]
                if len(members) != 1:
                    raise SkipItem(f"contains {len(members)} .jsonl files instead of one")
                with archive.open(members[0]) as opened:
                    yield from record_files.lines(opened)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise SkipItem(f"is damaged ({type(error).__name__}); download it again") from error
    except OSError as error:
        paths.check_passing(path, error)
        raise SkipItem("cannot be read") from error


def _document(
    name: str, data: bytes, context: Context, image_files: ImageFiles, folder: str, least: float, most: int
) -> Example:
    record = record_files.parse(data)
    sentences = _sentences(record)
    listed = record.get("image_info")
    if not isinstance(listed, list) or not listed:
        raise SkipItem("lists no images")
    matches = sorted(_matches(listed, len(sentences), least), key=lambda match: (-match[0], match[2]))
    placed: list[tuple[int, int, ImageRef]] = []
    for _, sentence, position in matches:
        if len(placed) == most:
            break
        image = _image(listed[position].get("image_name"), context, image_files, folder)
        if image is not None:
            placed.append((sentence, position, image))
    if not placed:
        raise SkipItem(f"none of its {len(listed)} images can be used")
    placed.sort(key=lambda entry: entry[:2])
    text = [literal(sentence) for sentence in sentences]
    for sentence, _, _ in placed:
        text[sentence] = f"{IMAGE_MARKER}{text[sentence]}"
    meta = metadata(
        context, modality="", group=record.get("url") or name, images_left_out=len(listed) - len(placed)
    )
    images = tuple(image for _, _, image in placed)
    return Example(name, "document", images, (Turn("assistant", " ".join(text), True),), meta=meta)


def _sentences(record: Mapping[str, Any]) -> list[str]:
    sentences = record.get("text_list")
    if not isinstance(sentences, list) or not sentences or len(sentences) > _MAX_SENTENCES:
        raise SkipItem("has no list of sentences under text_list")
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise SkipItem("a sentence is not text")
    return [sentence.replace("\0", "") for sentence in sentences]


def _matches(listed: list[Any], count: int, least: float) -> Iterator[tuple[float, int, int]]:
    """Yields (similarity, sentence, position in the list) of matching images."""
    for position, entry in enumerate(listed):
        if not isinstance(entry, dict):
            continue
        sentence, similarity = entry.get("matched_text_index"), entry.get("matched_sim")
        if isinstance(sentence, bool) or not isinstance(sentence, int) or not 0 <= sentence < count:
            continue
        if isinstance(similarity, bool) or not isinstance(similarity, int | float):
            continue
        if math.isfinite(similarity) and similarity >= least:
            yield float(similarity), sentence, position


def _image(name: object, context: Context, image_files: ImageFiles, folder: str) -> ImageRef | None:
    for place in (name, f"{folder}/{name}") if folder else (name,):
        try:
            return image_files.ref(context, place)
        except SkipItem:
            continue
    return None
