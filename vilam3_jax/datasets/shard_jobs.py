"""Shard jobs: a run of items becomes an ArrayRecord file and a report of its content.

Jobs run in worker processes. The report is saved beside the shard, so that an interrupted build can resume. A
shard is reused only if it matches its report, and its items, settings and opened files are unchanged.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from vilam3_jax.data import decoded_images, example_features
from vilam3_jax.data.content_keys import DECODER_VERSION, image_key
from vilam3_jax.data.examples import SCHEMA_VERSION, Example, ImageRef
from vilam3_jax.data.images import decode_image, decode_scaled, load_pixels
from vilam3_jax.data.records import Counts
from vilam3_jax.data.shards import open_reader
from vilam3_jax.data.tfds_folder import ShardFile, file_digest
from vilam3_jax.data.volumes import read_volume
from vilam3_jax.datasets.dataset import Context, Skipped, Split, examples_of
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

MAX_NAMED = 1000  # skipped records that a report names
_DUPLICATE = "another record has this id"
_MAX_REPORT_BYTES = 256 << 20
_MAX_IMAGE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """Processing of every example.

    Attributes:
      input_keys: add the content keys of its images, which link them to expert annotations.
      decode_side: store images decoded, with this side in pixels; 0: as encoded.
    """

    input_keys: bool = True
    decode_side: int = 0


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """A shard to build: `split` has only its items; `target` is its file in the work folder."""

    split: Split
    context: Context
    settings: Settings
    version: str
    target: str

    def digest(self) -> str:
        """Hash of everything that determines the content, except the opened files."""
        context = dataclasses.replace(self.context, root="")  # the source folder may be moved
        parts = (self.version, SCHEMA_VERSION, DECODER_VERSION, context, self.settings)
        digest = hashlib.sha256(f"{parts!r} {_stable_repr(self.split.make)}".encode())
        for item in self.split.items:
            digest.update(repr(item).encode(errors="surrogatepass"))
        return digest.hexdigest()


def _stable_repr(make: Any) -> str:
    """A function or `functools.partial` by name and arguments, without addresses that vary by process."""
    if isinstance(make, functools.partial):
        args = [_stable_repr(value) for value in make.args]
        args += [f"{key}={_stable_repr(value)}" for key, value in sorted(make.keywords.items())]
        return f"{_stable_repr(make.func)}({', '.join(args)})"
    if isinstance(make, types.FunctionType):
        return f"{make.__module__}.{make.__qualname__}"
    return repr(make)


@dataclasses.dataclass
class ShardReport:
    """Content of a shard.

    Attributes:
      digest: digest of the job.
      shard: `file`, `records`, `bytes`, `sha256`.
      counts: the form of `records.Counts.plain`.
      reasons: reason → number of skipped items.
      named: (record, reason) of the first skipped items.
      image_bytes: total size of the images, as files and as stored.
      files: path below the root → size and modification time of each opened file.
      ids: [N, 2] uint64, 128-bit hashes of record ids.
      persons, images: hash of a patient or group, or of an image → the first record with it.
    """

    digest: str
    shard: dict[str, Any]
    counts: dict[str, dict[str, int]]
    reasons: dict[str, int]
    named: list[list[str]]
    image_bytes: list[int]
    files: dict[str, list[int]]
    ids: np.ndarray
    persons: dict[str, str]
    images: dict[str, str]

    def save(self, target: str) -> None:
        """Writes the report of the shard `target` durably."""
        plain = vars(self) | {"ids": self.ids.tolist()}
        paths.write_bytes_durable(f"{target}.json", json.dumps(plain).encode())

    @classmethod
    def load(cls, target: str) -> ShardReport | None:
        """Reads the report of the shard `target`; None if it is missing or damaged."""
        try:
            plain = json.loads(paths.read_bytes(f"{target}.json", _MAX_REPORT_BYTES))
            plain["ids"] = np.asarray(plain["ids"], np.uint64).reshape(-1, 2)
            return cls(**plain)
        except (UserError, ValueError, TypeError, KeyError, OverflowError):
            return None


def finished(job: ShardJob) -> ShardReport | None:
    """The report of a shard that is complete and up to date, or None."""
    report = ShardReport.load(job.target)
    if report is None or report.digest != job.digest() or not os.path.exists(job.target):
        return None
    if file_digest(job.target) != (report.shard.get("sha256"), report.shard.get("bytes")):
        return None
    return report if _file_states(job.context.root, report.files) == report.files else None


def build(job: ShardJob) -> ShardReport:
    """Builds a shard.

    Raises:
      UserError: the disk is full.
      UnavailableError: the disk or the network fails.
    """
    context = dataclasses.replace(job.context, opened=[])
    file, counts, keys = ShardFile(job.target), Counts(), _ContentKeys(context)
    report = ShardReport(job.digest(), {}, {}, {}, [], [0, 0], {}, np.zeros((0, 2), np.uint64), {}, {})
    reasons: collections.Counter[str] = collections.Counter()
    ids: dict[bytes, None] = {}
    try:
        for made in examples_of(job.split, context):
            stored = _stored(made, job.settings, keys) if isinstance(made, Example) else made
            if not isinstance(stored, Skipped) and _hash(stored[0].id) in ids:
                stored = Skipped(stored[0].id, _DUPLICATE)
            if isinstance(stored, Skipped):
                reasons[stored.reason] += 1
                if len(report.named) < MAX_NAMED:
                    report.named.append([stored.record, stored.reason])
                continue
            example, data = stored
            assert isinstance(made, Example)  # else it was skipped
            for place, images_of in enumerate((made.images, example.images)):
                report.image_bytes[place] += sum(len(image.data or b"") for image in images_of)
            file.write(data)
            counts.add(example)
            ids[_hash(example.id)] = None
            if (person := example.meta.get("patient") or example.meta.get("group")) is not None:
                report.persons.setdefault(_hash(str(person)).hex(), example.id)
            for image in example.images:
                report.images.setdefault(_hash(image.data or str(image.path)).hex(), example.id)
    except BaseException:
        file.discard()
        raise
    report.shard, report.counts, report.reasons = file.commit(), counts.plain(), dict(reasons)
    report.files = _file_states(context.root, context.opened)
    report.ids = np.frombuffer(b"".join(ids), np.uint64).reshape(-1, 2)
    report.save(job.target)
    return report


def without(job: ShardJob, report: ShardReport, id_hashes: set[bytes]) -> ShardReport:
    """Rewrites a finished shard without the records of these id hashes, which count as skipped."""
    file, counts = ShardFile(job.target), Counts()
    reader = open_reader(job.target)
    reasons, named = collections.Counter(report.reasons), list(report.named)
    for place in range(reader.num_records()):
        (data,) = reader.read(place, place + 1)
        example = example_features.decode(data)
        if _hash(example.id) in id_hashes:
            reasons[_DUPLICATE] += 1
            named.append([example.id, _DUPLICATE])
            continue
        file.write(data)
        counts.add(example)
    kept = [row for row in report.ids if row.tobytes() not in id_hashes]
    changed = dataclasses.replace(
        report,
        shard=file.commit(),
        counts=counts.plain(),
        reasons=dict(reasons),
        named=named[:MAX_NAMED],
        ids=np.asarray(kept, np.uint64).reshape(-1, 2),
    )
    changed.save(job.target)
    return changed


def _stored(example: Example, settings: Settings, keys: _ContentKeys) -> tuple[Example, bytes] | Skipped:
    """The example as stored, with content keys and decoded images, and its bytes."""
    try:
        meta = dict(example.meta)
        if settings.input_keys and example.images and "input_key" not in meta:
            found = [keys.of(image) for image in example.images]
            meta["input_key"] = found[0] if len(found) == 1 else found
        images = example.images
        if settings.decode_side:
            images = tuple(_decoded(image, keys.context, settings.decode_side) for image in images)
        finished = dataclasses.replace(example, meta=meta, images=images)
        return finished, example_features.encode(finished)
    except UnavailableError:
        raise
    except UserError as reason:
        return Skipped(example.id, str(reason).removeprefix(f"example {example.id!r}: "))
    except UnicodeEncodeError:
        return Skipped(example.id, "a text is not UTF-8, or has an unpaired surrogate")


class _ContentKeys:
    """Cache of content keys: neighbouring examples often share an image or a volume."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._known: dict[Any, str] = {}

    def of(self, image: ImageRef) -> str:
        data = image.data
        source = (image.path, image.modality) if data is None else hashlib.sha256(data).digest()
        if source not in self._known:
            self._known[source] = self._read(image)
            if len(self._known) > 64:
                del self._known[next(iter(self._known))]
        return self._known[source]

    def _read(self, image: ImageRef) -> str:
        if image.data is not None:
            return image_key(decode_image(image.data))
        path = paths.as_path(self.context.root) / str(image.path)
        if image.axis is None:
            try:
                return image_key(load_pixels(path))
            except UnavailableError:
                raise
            except UserError as reason:  # omit the path: some name patients
                raise UserError(str(reason).removeprefix(f"{path}: ")) from None
        return read_volume(path, modality=image.modality).content_key


def _decoded(image: ImageRef, context: Context, side: int) -> ImageRef:
    """The image decoded and resized. Slices of volumes are kept: their rendering depends on the model."""
    if image.axis is not None:
        return image
    data = image.data
    if data is None:
        data = paths.read_bytes(paths.as_path(context.root) / str(image.path), _MAX_IMAGE_BYTES)
    return ImageRef(data=decoded_images.encode(decode_scaled(data, side)))


def _hash(value: bytes | str) -> bytes:
    return hashlib.blake2b(value if isinstance(value, bytes) else value.encode(), digest_size=16).digest()


def _file_states(root: str, files: Sequence[str] | dict[str, Any]) -> dict[str, list[int]]:
    """Size and modification time (ns; 0 in an object store) of the files that exist."""
    states = {}
    for name in dict.fromkeys(files):
        path = paths.as_path(root) / name
        with contextlib.suppress(OSError):  # a file that was missing before must be missing now
            modified = 0 if "://" in root else os.stat(path).st_mtime_ns
            states[name] = [paths.file_size(path), modified]
    return states
