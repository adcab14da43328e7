"""What is compared of a record: its images, volumes, patient, group and texts."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from vilam3_jax.data import content_keys
from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, path_problem
from vilam3_jax.data.leaks.fingerprints import Fingerprint, fingerprint
from vilam3_jax.data.leaks.texts import run_hashes
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.render import ImageReader
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

_IMAGE_CACHE_BYTES = 256 << 20
_KEPT_FINGERPRINTS = 1 << 15
_RECORDS_PER_WORKER = 16


@dataclasses.dataclass(frozen=True)
class Marks:
    """What is compared of a record.

    Attributes:
      id: of the record.
      images: pictures and rendered slices that could be read.
      volumes: keys of the volumes that its images are slices of.
      patient, group: as its meta has them, hashed; "" where it has none.
      texts: `run_hashes` of each question with its answer.
      unreadable: number of images that could not be read.
    """

    id: str
    images: tuple[Fingerprint, ...]
    volumes: tuple[str, ...]
    patient: str
    group: str
    texts: tuple[np.ndarray, ...]
    unreadable: int


class MarkReader:
    """Reads marks; safe among threads. Fingerprints are kept for records that share an image."""

    def __init__(self) -> None:
        """Keeps nothing yet."""
        self._reader = ImageReader(None, image_cache_bytes=_IMAGE_CACHE_BYTES)
        self._kept: collections.OrderedDict[Any, Fingerprint] = collections.OrderedDict()
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()

    def marks(self, example: Example, data_root: Any) -> Marks:
        """The marks of a record whose image paths are relative to `data_root`.

        Raises:
          UnavailableError: the disk or the network fails.
        """
        images, volumes, unreadable = [], [], 0
        for number, image in enumerate(example.images):
            try:
                if image.axis is not None:
                    volumes.append(self._volume_key(example, number, data_root))
                if image.axis is None or image.index is not None:
                    images.append(self._fingerprint(image, data_root))
            except UnavailableError:
                raise
            except (UserError, OSError, ValueError) as error:
                paths.check_passing(image.path or "image", error)
                unreadable += 1
        return Marks(
            example.id,
            tuple(images),
            tuple(volumes),
            _text(example.meta.get("patient")),
            _text(example.meta.get("group")),
            tuple(hashes for text in _exchanges(example) if len(hashes := run_hashes(text))),
            unreadable,
        )

    def _fingerprint(self, image: ImageRef, data_root: Any) -> Fingerprint:
        source = hashlib.sha256(image.data).digest() if image.data else (str(data_root), image.path)
        place = (source, image.axis, image.index, image.window, image.modality)
        with self._lock:
            if place in self._kept:
                self._kept.move_to_end(place)
                return self._kept[place]
        pixels = self._reader.read(image, data_root)
        made = fingerprint(pixels, content_keys.image_key(pixels))
        with self._lock:
            self._kept[place] = made
            if len(self._kept) > _KEPT_FINGERPRINTS:
                self._kept.popitem(last=False)
        return made

    def _volume_key(self, example: Example, number: int, data_root: Any) -> str:
        keys = example.meta.get("input_key")
        key = keys[number] if isinstance(keys, list) and number < len(keys) else keys
        if isinstance(key, str) and key:
            return key
        path = example.images[number].path or ""
        if problem := path_problem(path):
            raise UserError(problem)
        file = data_root / path
        if (known := self._digests.get(os.fspath(file))) is None:
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
            known = self._digests[os.fspath(file)] = f"file:{digest.hexdigest()}"
        return known


def read_marks(source: ExampleSource, reader: MarkReader, workers: int) -> Iterator[Marks | None]:
    """The marks of all records in their order; None for a record that cannot be read.

    Args:
      source: the records.
      reader: of their images.
      workers: threads.

    Raises:
      UnavailableError: the disk or the network fails.
    """

    def marks(index: int) -> Marks | None:
        try:
            return reader.marks(source[index], source.data_root)
        except UnavailableError:
            raise
        except UserError:
            return None

    step = _RECORDS_PER_WORKER * workers
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="vilam3-leaks") as pool:
        for start in range(0, len(source), step):
            yield from pool.map(marks, range(start, min(start + step, len(source))))


def _exchanges(example: Example) -> Iterator[str]:
    """Each answer with the words before it."""
    asked = ""
    for turn in example.turns:
        if turn.role == "user":
            asked = turn.text.replace(IMAGE_MARKER, " ")
        elif turn.role == "assistant":
            yield f"{asked} {turn.text}"
            asked = ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
