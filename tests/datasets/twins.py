"""Shared code of dataset tests: images, files of synthetic sources, and building examples from them."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vilam3_jax.data.example_features import decode, encode
from vilam3_jax.data.examples import Example
from vilam3_jax.datasets.dataset import Dataset, Skipped, examples_of
from vilam3_jax.datasets.source_files import SourceFolder


def picture(number: int, side: int = 16, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """Returns an image that is unique for each number."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Writes files by path: bytes and text verbatim, `.json`, `.jsonl` and `.csv[.gz]` from values.

    A table is a list of rows, the first one is the header.
    """
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = _encoded(name, content)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def _encoded(name: str, content: Any) -> bytes:
    if name.endswith(".json"):
        return json.dumps(content).encode()
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in content).encode()
    text = io.StringIO()
    csv.writer(text).writerows(content)
    return text.getvalue().encode()


def made(
    dataset: type[Dataset], folder: Path, config: str = "", argv: Sequence[str] = (), **settings: Any
) -> tuple[dict[str, list[Example]], dict[str, list[Skipped]]]:
    """Returns (examples, skipped items) by split, without shards or processes.

    Checks requirements of all datasets: items are picklable, ids are unique, and encoding is lossless.

    Args:
      dataset: the class.
      folder: the source folder.
      config: the variant.
      argv: options of the dataset.
      settings: of the context, such as `parity=True`.
    """
    parser = argparse.ArgumentParser()
    dataset.add_arguments(parser)
    maker = dataset(parser.parse_args(list(argv)), config)
    source = SourceFolder(folder, maker.instructions)
    examples: dict[str, list[Example]] = {}
    skipped: dict[str, list[Skipped]] = {}
    for name, split in maker.splits(source).items():
        pickle.dumps((split.make, split.name_of, split.items[:1]))
        assert " at 0x" not in repr(list(split.items)), "the digest of a shard would differ between runs"
        found = list(examples_of(split, maker.context(source, name, **settings)))
        examples[name] = [one for one in found if isinstance(one, Example)]
        skipped[name] = [one for one in found if isinstance(one, Skipped)]
    ids = [one.id for found in examples.values() for one in found]
    assert len(set(ids)) == len(ids), "duplicate ids"
    for found in examples.values():
        assert [decode(encode(one)) for one in found] == found, "encoding changes an example"
    return examples, skipped
