"""Signatures of records: the properties by which the leak search compares them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from vilam3_jax.data import content_keys
from vilam3_jax.data.caches import ByteLRU
from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, path_problem
from vilam3_jax.data.leaks.fingerprints import Fingerprint, fingerprint
from vilam3_jax.data.leaks.texts import run_hashes
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.render import ImageReader
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

_IMAGE_CACHE_BYTES = 256 << 20
_MAX_CACHED_FINGERPRINTS = 1 << 15
_RECORDS_PER_WORKER = 16


@dataclasses.dataclass(frozen=True)
class RecordSignature:
    """The compared properties of a record."""

    id: str  # record id
    images: tuple[Fingerprint, ...]  # fingerprints of its images and rendered slices
    # "image", "volume", "patient" and "group" -> exact-match keys, empty if the record has none. Patients and
    # groups are hashed, as in `Example.meta`.
    keys: dict[str, set[str]]
    texts: tuple[np.ndarray, ...]  # `run_hashes` of each question with its answer
    unreadable_images: int  # number of images that could not be read


class SignatureReader:
    """Computes signatures; thread-safe. Caches fingerprints of images that several records share."""

    def __init__(self) -> None:
        """Creates empty caches."""
        self._reader = ImageReader(None, image_cache_bytes=_IMAGE_CACHE_BYTES)
        self._fingerprints: ByteLRU[Fingerprint] = ByteLRU(_MAX_CACHED_FINGERPRINTS, lambda fingerprint: 1)
        self._digests: dict[str, str] = {}

    def read(self, example: Example, data_root: Any) -> RecordSignature:
        """Computes the signature of a record whose image paths are relative to `data_root`."""
        images, volumes, unreadable = [], set(), 0
        for index, image in enumerate(example.images):
            try:
                if image.axis is not None:
                    volumes.add(self._volume_key(example, index, data_root))
                if image.axis is None or image.index is not None:
                    images.append(self._fingerprint(image, data_root))
            except UnavailableError:
                raise
            except (UserError, OSError, ValueError) as error:
                paths.check_passing(image.path or "image", error)
                unreadable += 1
        keys = {"image": {image.key for image in images}, "volume": volumes}
        for kind in ("patient", "group"):
            value = example.meta.get(kind)
            keys[kind] = {value} if isinstance(value, str) and value else set()
        texts = tuple(hashes for text in _questions_with_answers(example) if len(hashes := run_hashes(text)))
        return RecordSignature(example.id, tuple(images), keys, texts, unreadable)

    def _fingerprint(self, image: ImageRef, data_root: Any) -> Fingerprint:
        def compute() -> Fingerprint:
            pixels = self._reader.read(image, data_root)
            return fingerprint(pixels, content_keys.image_key(pixels))

        source = hashlib.sha256(image.data).digest() if image.data else (str(data_root), image.path)
        return self._fingerprints.get(
            (source, image.axis, image.index, image.window, image.modality), compute
        )

    def _volume_key(self, example: Example, index: int, data_root: Any) -> str:
        keys = example.meta.get("input_key")
        key = keys[index] if isinstance(keys, list) and index < len(keys) else keys
        if isinstance(key, str) and key:
            return key
        path = example.images[index].path or ""
        if problem := path_problem(path):
            raise UserError(problem)
        file = data_root / path
        if (digest := self._digests.get(os.fspath(file))) is None:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            self._digests[os.fspath(file)] = digest
        return f"file:{digest}"


def read_signatures(
    source: ExampleSource, reader: SignatureReader, workers: int
) -> Iterator[RecordSignature | None]:
    """Yields the signatures of all records in order, None for a damaged one; uses `workers` threads."""

    def read(index: int) -> RecordSignature | None:
        try:
            return reader.read(source[index], source.data_root)
        except UnavailableError:
            raise
        except UserError:
            return None

    step = _RECORDS_PER_WORKER * workers
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="vilam3-leaks") as pool:
        for start in range(0, len(source), step):
            yield from pool.map(read, range(start, min(start + step, len(source))))


def _questions_with_answers(example: Example) -> Iterator[str]:
    question = ""
    for turn in example.turns:
        if turn.role == "user":
            question = turn.text.replace(IMAGE_MARKER, " ")
        elif turn.role == "assistant":
            yield f"{question} {turn.text}"
            question = ""
