"""The order of samples: datasets mixed by weight, reshuffled every epoch, addressed by one index.

Any position can be asked for directly, so a loader's place in the data is a number.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import grain

from vilam3_jax import paths
from vilam3_jax.data.examples import IMAGE_MARKER, Example
from vilam3_jax.data.records import INFO_NAME, ExampleSource, read_info
from vilam3_jax.errors import UserError

_HELD_OUT_SEED = 0
_DEALING = "turned"  # how positions go to shards; part of the fingerprint, as a state counts them

Mixture = Sequence[tuple[str, float]]


def open_sources(path: paths.PathLike, mixture: Mixture, split: str) -> list[tuple[ExampleSource, float]]:
    """Opens the datasets of a mixture.

    Args:
      path: a folder of datasets, one folder each, or the folder of a single dataset.
      mixture: (name, weight); empty for the single dataset at `path`.
      split: 'train' must be in all of them; any other split in at least one, the rest are left out.

    Raises:
      UserError: a dataset or split is missing, or a weight is not positive.
    """
    root = paths.as_path(path)
    if not path:
        raise UserError("config data.path is empty; set it to the folder that `vilam3 prepare` wrote")
    if not mixture:
        return [(ExampleSource(root, split), 1.0)]
    found = []
    for row in mixture:
        if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
            raise UserError(
                f"config data.mixture: {row!r} is no row (data set, weight); a comma may be missing"
            )
        name, weight = row
        if not isinstance(weight, int | float) or not weight > 0:
            raise UserError(f"config data.mixture: weight {weight!r} of {name!r} must be positive")
        folder = root / name
        if not (folder / INFO_NAME).exists() and len(mixture) == 1 and (root / INFO_NAME).exists():
            folder = root
        if split == "train" or split in read_info(folder)["splits"]:
            found.append((ExampleSource(folder, split), float(weight)))
    if not found:
        raise UserError(
            f"{path}: no dataset of the mixture has a split {split!r}; prepare one or set eval_every=0"
        )
    return found


def dealt_position(index: int, shard: int, shards: int) -> int:
    """Which position of the stream is the `index`-th of a loader shard.

    Every run of `shards` positions goes to all shards once, turned by an amount that only `index` decides: a
    mixture repeats itself, and a shard that took every n-th position might see one dataset alone.
    """
    turn = int.from_bytes(hashlib.blake2b(str(index).encode(), digest_size=8).digest(), "big")
    return index * shards + (shard + turn) % shards


class SampleStream:
    """Positions 0, 1, 2, ... to (dataset, record).

    Attributes:
      sources: the datasets.
      length: number of positions; None for the endless training order.
      records: number of distinct records.
    """

    def __init__(self, sources: Sequence[tuple[ExampleSource, float]], seed: int, endless: bool) -> None:
        """Builds the order.

        Args:
          sources: datasets and weights.
          seed: of the shuffles.
          endless: True: shuffled every epoch, repeated, mixed by weight. False: every record once, in
            an order that is the same for every seed.
        """
        self.sources = [source for source, _ in sources]
        self.records = sum(len(source) for source in self.sources)
        self.length = None if endless else self.records
        described = [[s.name, s.split, len(s), w, _digest(s)] for s, w in sources]
        self.fingerprint = hashlib.sha256(
            json.dumps([_DEALING, described, seed, endless]).encode()
        ).hexdigest()[:16]
        addresses = [
            grain.MapDataset.source([(number, record) for record in range(len(source))])
            for number, source in enumerate(self.sources)
        ]
        if endless:
            # Datasets of one size must not walk in step, so each has its own seed.
            orders = [a.seed(_seed(seed, n)).shuffle().repeat() for n, a in enumerate(addresses)]
            self._order = grain.MapDataset.mix(orders, [weight for _, weight in sources])
        else:
            # Neighbours are slices of one scan: in order, the first batches would be a patient or two.
            self._order = grain.MapDataset.concatenate(addresses).seed(_HELD_OUT_SEED).shuffle()

    def address(self, position: int) -> tuple[int, int]:
        """Returns (number of the dataset, record in it)."""
        address = self._order[position]
        assert address is not None  # None is for filtered datasets
        return address

    def name(self, address: tuple[int, int]) -> str:
        """Names a record in messages."""
        source = self.sources[address[0]]
        return f"{source.name}/{source.split} record {address[1]}"


def _digest(source: ExampleSource) -> list[str]:
    return [shard.get("sha256", "") for shard in source.info["splits"][source.split]["shards"]]


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big") >> 1


def choose_donors(sources: Sequence[ExampleSource]) -> dict[tuple[int, int], tuple[int, int]]:
    """For every record with images, whose images it takes when images are exchanged.

    A donor is of another patient and, as far as there is one, has as many images. It may be of another
    modality or region: that is the least a model that looks at its images must notice.

    Returns:
      Address to address; records without a possible donor are missing.
    """
    known = []
    for number, source in enumerate(sources):
        for record, example in enumerate(source):
            meta = example.meta
            if example.images:
                person = meta.get("group") or meta.get("patient") or f"record {number} {record}"
                known.append(_Known((number, record), len(example.images), person))
    rings: dict[Any, list[_Known]] = collections.defaultdict(list)
    for entry in known:
        for ring in (entry.images, None):
            rings[ring].append(entry)
    donors = {}
    for entry in known:
        choices = (_other(entry, rings[ring]) for ring in (entry.images, None))
        choice = next((c for c in choices if c is not None), None)
        if choice is None and len(known) > 1:
            choice = known[known.index(entry) - 1]
        if choice is not None:
            donors[entry.address] = choice.address
    return donors


@dataclasses.dataclass(frozen=True)
class _Known:
    address: tuple[int, int]
    images: int
    person: str


def _other(entry: _Known, ring: Sequence[_Known]) -> _Known | None:
    """The first of another person, from half-way round, which spreads the donors over all records."""
    start = bisect.bisect_left(ring, entry.address, key=lambda e: e.address) + len(ring) // 2
    turned = (ring[(start + step) % len(ring)] for step in range(len(ring)))
    return next((other for other in turned if other.person != entry.person), None)


def pair_caption(example: Example) -> str:
    """The caption of an example with one image, for the contrastive stage.

    Raises:
      UserError: the example is no pair.
    """
    if example.format not in ("pair", "caption") or len(example.images) != 1:
        raise UserError(f"a {example.format} with {len(example.images)} images is no image-text pair")
    return " ".join(t.text for t in example.turns if t.role == "assistant").replace(IMAGE_MARKER, "").strip()
