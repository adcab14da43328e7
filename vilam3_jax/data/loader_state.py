"""The state of a loader as JSON, and the check that data, tokenizer and image files still match it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from vilam3_jax.data import file_digests, stream
from vilam3_jax.data.loader_records import RecordLoader
from vilam3_jax.data.loader_shards import Place
from vilam3_jax.errors import UserError

State = dict[str, dict[str, Any]]  # number of a loader shard → its state, as JSON values


@dataclasses.dataclass(frozen=True)
class Binding:
    """What a state depends on, besides image files.

    Attributes:
      order: hash of datasets, weights and seed.
      tokenizer: hash of the tokenizer.
      annotations: hash of the annotations; "" with experts off.
    """

    order: str
    tokenizer: str
    annotations: str


def to_state(places: Mapping[int, Place], binding: Binding, sources: Sequence[stream.Source]) -> State:
    """The state of shards; reads the image files that it depends on.

    Raises:
      UnavailableError: an image file cannot be read now.
    """
    digests = iter(file_digests.digests(_paths(places, sources)))
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
    records: RecordLoader,
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
    paths = _paths(places, records.samples.sources)
    for path, old, new in zip(paths, expected, file_digests.digests(paths), strict=True):
        if old != new:
            now = "is missing" if new == file_digests.MISSING else "has changed"
            raise UserError(
                f"{path}: {now} since the data state was saved; restore the file, or start a new workdir"
            )
    return places


def _check_binding(own: Mapping[str, Any], binding: Binding) -> None:
    if own.get("order") != binding.order:
        raise UserError(
            "data state is of other data, or of a version of this package with another order of samples; "
            "restore the datasets, data.mixture, seed and version, or start a new workdir"
        )
    # The next two are absent in older checkpoints.
    if own.get("tokenizer", binding.tokenizer) != binding.tokenizer:
        raise UserError(
            "data state is of another tokenizer; set model.tokenizer to the one that the run started with, "
            "or start a new workdir"
        )
    if own.get("annotations", binding.annotations) != binding.annotations:
        raise UserError(
            "data state is of other annotations; restore data.annotations and data.experts, or start a new "
            "workdir"
        )
