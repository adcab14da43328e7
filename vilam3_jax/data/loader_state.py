"""The state of a loader as JSON, and the check that data, tokenizer and image files still match it.

A digest of an image file covers its size and three blocks of it. Images and volumes are usually compressed,
so a changed pixel changes the data after it or a final checksum. In an uncompressed file, a change between
the blocks that keeps the size goes undetected. Modification times are ignored: copying changes them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from vilam3_jax.data import stream
from vilam3_jax.data.loader_shards import Place
from vilam3_jax.data.sample_reader import SampleReader
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_BLOCK = 1 << 16
_THREADS = 16
_MISSING = "missing"

State = dict[str, dict[str, Any]]  # number of a loader shard → its state, as JSON values


@dataclasses.dataclass(frozen=True)
class Binding:
    """What a state depends on, besides image files."""

    order: str  # hash of datasets, weights and seed
    tokenizer: str  # hash of the tokenizer
    annotations: str  # hash of the annotations; "" with experts off


def to_state(places: Mapping[int, Place], binding: Binding, sources: Sequence[stream.Source]) -> State:
    """The state of shards; raises `UnavailableError` if an image file of them cannot be read now."""
    digests = iter(_digests(_paths(places, sources)))
    return {
        str(number): {
            "next": place.next,
            "pending": list(place.pending),
            "groups": place.groups,
            **dataclasses.asdict(binding),
            "pictures": {str(n): [next(digests) for _ in files] for n, (_, files) in place.files.items()},
        }
        for number, place in places.items()
    }


def _paths(places: Mapping[int, Place], sources: Sequence[stream.Source]) -> list[epath.Path]:
    """The image files of all shards, in order."""
    return [
        sources[source].data_root / name
        for place in places.values()
        for source, names in place.files.values()
        for name in names
    ]


def from_state(
    state: Mapping[str, Mapping[str, Any]],
    numbers: Iterable[int],
    shards: int,
    binding: Binding,
    records: SampleReader,
) -> dict[int, Place]:
    """The places of the shards `numbers`, in a state of these and maybe other shards.

    Raises:
      UserError: number of shards, data, tokenizer, annotations or an image file differ from the state.
      UnavailableError: an image file cannot be read now.
    """
    places, expected = {}, []
    for number in numbers:
        if str(number) not in state or any(int(key) >= shards for key in state):
            raise UserError(
                f"data state has shards {', '.join(sorted(state, key=int))}, this run has {shards}; "
                "restore data.loader_shards"
            )
        own = state[str(number)]
        _check_binding(own, binding)
        files = {}
        for index, digests in own.get("pictures", {}).items():  # absent in older states
            position = stream.dealt_position(int(index), number, shards)
            sample = records.load_again(position, int(index))
            files[int(index)] = (sample.source, sample.image_paths)
            expected += digests
        places[number] = Place(int(own["next"]), int(own["groups"]), tuple(own["pending"]), files)
    image_files = _paths(places, records.samples.sources)
    for path, old, new in zip(image_files, expected, _digests(image_files), strict=True):
        if old != new:
            now = "is missing" if new == _MISSING else "has changed"
            raise UserError(
                f"{path}: {now} since the data state was saved; restore the file, or start a new workdir"
            )
    return places


def _check_binding(own: Mapping[str, Any], binding: Binding) -> None:
    own = {"tokenizer": binding.tokenizer, "annotations": binding.annotations, **own}  # absent in older ones
    if own.get("order") != binding.order:
        problem = (
            "other data, or of a version of this package with another order of samples; restore the "
            "datasets, data.mixture, seed and version"
        )
    elif own["tokenizer"] != binding.tokenizer:
        problem = "another tokenizer; set model.tokenizer to the one that the run started with"
    elif own["annotations"] != binding.annotations:
        problem = "other annotations; restore data.annotations and data.experts"
    else:
        return
    raise UserError(f"data state is of {problem}, or start a new workdir")


def _digests(files: Sequence[epath.Path]) -> list[str]:
    """`_digest` of every file, in parallel."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_digest, files))


def _digest(path: epath.Path) -> str:
    """The digest of a file, or of the listing of a folder such as a DICOM series: 24 hexadecimal digits.

    `_MISSING` if there is no such file; raises `UnavailableError` if the disk or the network fails.
    """
    try:
        if path.is_dir():
            found = hashlib.blake2b(digest_size=12)
            for child in sorted(paths.children(path), key=lambda child: child.name):
                found.update(f"{child.name}/{paths.file_size(child)}\n".encode())
            return found.hexdigest()
        return _file_digest(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return _MISSING
    except OSError as error:
        paths.check_passing(path, error)
        return _MISSING


def _file_digest(path: epath.Path) -> str:
    size = paths.file_size(path)
    found = hashlib.blake2b(str(size).encode(), digest_size=12)
    with path.open("rb") as file:
        if size <= 3 * _BLOCK:
            found.update(file.read())
            return found.hexdigest()
        for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
            file.seek(start)
            found.update(file.read(_BLOCK))
    return found.hexdigest()
