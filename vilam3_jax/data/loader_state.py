"""A loader's place in its data as JSON, and whether data, tokenizer and pictures still fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vilam3_jax.data import file_digests, stream
from vilam3_jax.data.loader_records import BadRecord, RecordLoader
from vilam3_jax.data.loader_shards import Place
from vilam3_jax.errors import UserError

State = dict[str, dict[str, Any]]  # number of a loader shard → its state, plain values


@dataclasses.dataclass(frozen=True)
class Binding:
    """What a state depends on, beside pictures.

    Attributes:
      order: hash of datasets, weights and seed.
      tokenizer: hash of the tokenizer.
      annotations: hash of what the experts said, "" with experts off.
    """

    order: str
    tokenizer: str
    annotations: str


def to_state(places: Mapping[int, Place], binding: Binding, sources: Sequence[stream.Source]) -> State:
    """The state of shards at their places; reads the pictures that it is bound to.

    Raises:
      UnavailableError: a picture cannot be read now.
    """
    keys = [(number, index) for number, place in places.items() for index in place.pictures]
    files = [
        [sources[source].data_root / path for path in names]
        for number, index in keys
        for source, names in [places[number].pictures[index]]
    ]
    found = iter(file_digests.digests([file for of_sample in files for file in of_sample]))
    pictures: dict[int, dict[str, list[str]]] = {number: {} for number in places}
    for (number, index), of_sample in zip(keys, files, strict=True):
        pictures[number][str(index)] = [next(found) for _ in of_sample]
    return {
        str(number): {
            "next": place.next,
            "pending": list(place.pending),
            "groups": place.groups,
            "order": binding.order,
            "tokenizer": binding.tokenizer,
            "annotations": binding.annotations,
            "pictures": pictures[number],
        }
        for number, place in places.items()
    }


def from_state(
    state: Mapping[str, Mapping[str, Any]],
    numbers: Iterable[int],
    shards: int,
    binding: Binding,
    records: RecordLoader,
) -> dict[int, Place]:
    """The places of the shards `numbers`.

    Args:
      state: of these shards, and maybe of others.
      numbers: of the shards of this process.
      shards: S.
      binding: of this run.
      records: of this run.

    Raises:
      UserError: the state is of another number of shards, of other data, another tokenizer, other annotations
        or other pictures; the last names the file.
      UnavailableError: a picture cannot be read now.
    """
    places = {}
    for number in numbers:
        if str(number) not in state or any(int(key) >= shards for key in state):
            raise UserError(
                f"data state has shards {', '.join(sorted(state, key=int))}, this run has {shards}; "
                "set data.loader_shards as it was"
            )
        own = state[str(number)]
        _check_binding(own, binding)
        places[number] = Place(int(own["next"]), int(own["groups"]), tuple(own["pending"]))
    pictures = {number: _pictures(state[str(number)], number, shards, records) for number in places}
    _check_pictures(state, pictures, records)
    return {n: dataclasses.replace(place, pictures=pictures[n]) for n, place in places.items()}


def _check_binding(own: Mapping[str, Any], binding: Binding) -> None:
    if own.get("order") != binding.order:
        raise UserError(
            "data state is of other data, or of a version of this package that orders samples otherwise; "
            "restore the datasets, data.mixture, seed and version as they were, "
            "or start a new workdir"
        )
    # Both are absent in older checkpoints.
    if own.get("tokenizer", binding.tokenizer) != binding.tokenizer:
        raise UserError(
            "data state is of another tokenizer; set model.tokenizer to the one that the run began "
            "with, or start a new workdir"
        )
    if own.get("annotations", binding.annotations) != binding.annotations:
        raise UserError(
            "data state is of other annotations; restore data.annotations and data.experts as they "
            "were, or start a new workdir"
        )


def _pictures(
    own: Mapping[str, Any], number: int, shards: int, records: RecordLoader
) -> dict[int, tuple[int, tuple[str, ...]]]:
    """Where the pictures lie that a shard's state is bound to; older states name none."""
    found = {}
    for index in map(int, own.get("pictures", {})):
        sample = records.load(stream.dealt_position(index, number, shards), index)
        if isinstance(sample, BadRecord):
            raise UserError(
                f"{sample.name}: was read before the restart, now: {sample.reason}; restore the data"
            )
        found[index] = (sample.source, sample.picture_paths)
    return found


def _check_pictures(
    state: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[int, Mapping[int, tuple[int, tuple[str, ...]]]],
    records: RecordLoader,
) -> None:
    sources = records.samples.sources
    files, before = [], []
    for number, of_shard in pictures.items():
        for index, (source, names) in of_shard.items():
            files += [sources[source].data_root / name for name in names]
            before += state[str(number)]["pictures"][str(index)]
    for file, old, new in zip(files, before, file_digests.digests(files), strict=True):
        if old != new:
            now = "is gone" if new == file_digests.MISSING else "is another picture"
            raise UserError(
                f"{file}: {now} since the data state was saved; restore the file, or start a new workdir"
            )
