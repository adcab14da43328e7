"""MMC4: web pages with their pictures between the sentences, as far as it is still published."""

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
from vilam3_jax.datasets.pictures import Pictures, find_pictures
from vilam3_jax.datasets.record_files import Place
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_PATTERNS = ("docs_*shard_*.jsonl", "docs_*shard_*.jsonl.zip")
_NUMBER = re.compile(r"shard_(\d+)")
_PER_SHARD = 200
_MAX_IMAGES = 6  # of one sample in VILA's pre-training
_LONGEST_DOCUMENT = 100_000  # sentences


class Mmc4(Dataset):
    """Documents of interleaved pictures and text.

    Of the published sets only those without faces are left, such as mmc4-core-ff. A picture stands before the
    sentence that it matches; several of one sentence keep their order. Pictures that were not downloaded, or
    lie below `--min-similarity`, are left out, and documents without any picture are skipped. VILA takes at
    most six pictures of a document, but does not say which: here the most similar ones.
    """

    name = "mmc4"
    description = "Web pages with pictures between the sentences (MMC4 without faces)."
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
        """Declares which pictures are used."""
        parser.add_argument(
            "--min-similarity", type=float, default=0.0, metavar="X", help="least matched_sim of a picture"
        )
        parser.add_argument(
            "--max-images", type=int, default=_MAX_IMAGES, metavar="N", help="pictures of one document"
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Lists the shards."""
        if self.options.max_images < 1:
            raise UserError(f"--max-images {self.options.max_images}: give 1 or more")
        found = [
            name
            for pattern in _PATTERNS
            for folder in ("", "docs/")
            for name in source.glob(folder + pattern)
        ]
        # A shard that was unpacked beside its archive is one shard.
        found = [
            name for name in found if name.removesuffix(".zip") not in found or not name.endswith(".zip")
        ]
        if not found:
            source.require("docs_..._shard_<N>_v3.jsonl")
        make = functools.partial(
            _make,
            pictures=find_pictures(source, ["images"], ["images.zip"]),
            least=self.options.min_similarity,
            most=self.options.max_images,
        )
        return {"train": Split(sorted(found), make, per_item=_PER_SHARD)}


def _make(
    shard: str, context: Context, *, pictures: Pictures, least: float, most: int
) -> Iterator[Example | Skipped]:
    number = _NUMBER.search(shard)
    folder = number[1] if number else ""
    stem = os.path.basename(shard).split(".")[0]
    for place, data in _lines(context, shard):
        try:
            yield _document(f"{stem}/{place.row}", data, context, pictures, folder, least, most)
        except (SkipItem, record_files.NotRecord) as reason:
            yield Skipped(f"{shard} record {place.row}", str(reason))


def _lines(context: Context, shard: str) -> Iterator[tuple[Place, bytes]]:
    """The lines of a shard, which may be the only file of a zip archive."""
    path = context.file(shard)
    try:
        with path.open("rb") as file:
            if not shard.endswith(".zip"):
                yield from record_files.lines(file)
                return
            with zipfile.ZipFile(file) as archive:
                members = [info for info in archive.infolist() if _is_lines(info.filename)]
                if len(members) != 1:
                    raise SkipItem(f"holds {len(members)} .jsonl files, one is expected")
                with archive.open(members[0]) as opened:
                    yield from record_files.lines(opened)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise SkipItem(f"is damaged ({type(error).__name__}); download it again") from error
    except OSError as error:
        paths.check_passing(path, error)
        raise SkipItem("cannot be read") from error


def _is_lines(name: str) -> bool:
    """Whether a member of an archive holds records; macOS adds `__MACOSX/._NAME` for each."""
    return name.endswith(".jsonl") and not os.path.basename(name).startswith("._")


def _document(
    name: str, data: bytes, context: Context, pictures: Pictures, folder: str, least: float, most: int
) -> Example:
    record = record_files.parse(data)
    sentences = _sentences(record)
    listed = record.get("image_info")
    if not isinstance(listed, list) or not listed:
        raise SkipItem("lists no pictures")
    wanted = sorted(_matches(listed, len(sentences), least), key=lambda match: (-match[0], match[2]))
    placed: list[tuple[int, int, ImageRef]] = []
    for _, sentence, position in wanted:
        if len(placed) == most:
            break
        image = _opened(listed[position].get("image_name"), context, pictures, folder)
        if image is not None:
            placed.append((sentence, position, image))
    if not placed:
        raise SkipItem(f"none of its {len(listed)} pictures can be used")
    placed.sort(key=lambda entry: entry[:2])
    text = [literal(sentence) for sentence in sentences]
    for sentence, _, _ in placed:
        text[sentence] = f"{IMAGE_MARKER}{text[sentence]}"
    meta = metadata(
        context, modality="", group=record.get("url") or name, pictures_left_out=len(listed) - len(placed)
    )
    images = tuple(image for _, _, image in placed)
    return Example(name, "document", images, (Turn("assistant", " ".join(text), True),), meta=meta)


def _sentences(record: Mapping[str, Any]) -> list[str]:
    sentences = record.get("text_list")
    if not isinstance(sentences, list) or not sentences or len(sentences) > _LONGEST_DOCUMENT:
        raise SkipItem("has no list of sentences under text_list")
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise SkipItem("a sentence is no text")
    return [sentence.replace("\0", "") for sentence in sentences]


def _matches(listed: list[Any], count: int, least: float) -> Iterator[tuple[float, int, int]]:
    """(similarity, sentence, position in the list) of the pictures that match a sentence well enough."""
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


def _opened(name: object, context: Context, pictures: Pictures, folder: str) -> ImageRef | None:
    for place in (name, f"{folder}/{name}") if folder else (name,):
        try:
            return pictures.ref(context, place)
        except SkipItem:
            continue
    return None
