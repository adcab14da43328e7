"""The order of samples: datasets mixed by weight, reshuffled every epoch, addressed by one index.

A weight is the number of epochs of its dataset in a *pass* of the mixture. Any position can be asked for
directly, so a loader's place in the data is a number.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import fractions
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import grain
from etils import epath

from vilam3_jax.data.examples import IMAGE_MARKER, Example
from vilam3_jax.data.experts.dialogues.rules import Rule, split_row
from vilam3_jax.data.experts.dialogues.scene import Setting
from vilam3_jax.data.experts.dialogues.source import DialogueSource, under_rules, why_left_out
from vilam3_jax.data.interleave import Interleaving
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.tfds_folder import datasets_in, is_dataset, read_info
from vilam3_jax.errors import UnavailableError, UserError, warn_of
from vilam3_jax.runtime import paths

_HELD_OUT_SEED = 0
# How positions go to shards and to datasets; part of the fingerprint, as a state counts them.
_ORDER = "turned, earliest deadline first"
_FINEST_WEIGHT = 1_000_000  # the largest denominator of a weight
_LEAST_SHARE = fractions.Fraction(1, 10_000_000)  # finding a place takes a dataset's share as many steps

Mixture = Sequence[tuple[str, float]]
Source = ExampleSource | DialogueSource


def open_sources(
    path: paths.PathLike, mixture: Mixture, split: str, dialogues: Setting | None = None, seed: int = 0
) -> list[tuple[Source, float]]:
    """Opens the datasets of a mixture.

    Args:
      path: a folder of datasets, one folder each, or the folder of a single dataset.
      mixture: (name, weight) or (name:rule, weight), see `data/experts/dialogues`; empty for the single
        dataset at `path`.
      split: 'train' must be in all of them; any other split in at least one, the rest are left out.
      dialogues: what the dialogues of rules are made with.
      seed: of the dialogues.

    Returns:
      (source, weight), in the order of the mixture. The records that a rule does not fit are not in its
      source; how many and why is an `InputWarning`.

    Raises:
      UserError: a dataset or split is missing, a weight is not positive, there is no such rule, or a rule of
        the training mixture fits no record.
    """
    root = paths.as_path(path)
    if not path:
        raise UserError("config data.path is empty; set it to the folder that `vilam3 prepare` wrote")
    if not mixture:
        return [(ExampleSource(root, split), 1.0)]
    found: list[tuple[ExampleSource, Rule | None, float]] = []
    for row in mixture:
        if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
            raise UserError(
                f"config data.mixture: {row!r} is not a row (dataset, weight); a comma may be missing"
            )
        name, weight = row
        epochs_of(name, weight)
        dataset, rule = split_row(name)
        folder = root / dataset
        alone = len({split_row(str(r[0]))[0] for r in mixture}) == 1
        if alone and not folder.exists() and is_dataset(root):
            folder = root
        if not paths.exists(folder):
            raise UserError(
                f"config data.mixture: no dataset {dataset!r} in {root}, which has {_names_in(root)}; "
                "correct the name or make it with `vilam3 prepare`"
            )
        if split == "train" or split in read_info(folder)["splits"]:
            found.append((ExampleSource(folder, split), rule, float(weight)))
    opened = _under_rules(found, split, dialogues, seed)
    if not opened:
        raise UserError(
            f"{path}: no dataset of the mixture has a split {split!r}; prepare one or set eval_every=0"
        )
    return opened


def _names_in(root: epath.Path) -> str:
    """The datasets of a folder, with their variants, for messages."""
    try:
        return ", ".join(path.relative_to(root).as_posix() for path in datasets_in(root))
    except UserError:
        return "none"


def _under_rules(
    rows: Sequence[tuple[ExampleSource, Rule | None, float]], split: str, setting: Setting | None, seed: int
) -> list[tuple[Source, float]]:
    """Rows with their rules; the records of one dataset are read once for all rules."""
    ruled: dict[str, list[tuple[ExampleSource, Rule]]] = collections.defaultdict(list)
    for source, rule, _ in rows:
        if rule is not None:
            ruled[str(source.directory)].append((source, rule))
    if ruled and setting is None:
        raise UserError(
            "config data.annotations is empty, but data.mixture names rules, whose dialogues are made of "
            "annotations; set it"
        )
    made: dict[tuple[str, str], DialogueSource] = {}
    for folder, pairs in ruled.items():
        assert setting is not None  # or it was refused
        rules = list({rule.name: rule for _, rule in pairs}.values())
        for source in under_rules(pairs[0][0], rules, setting, seed):
            made[folder, source.rule.name] = source
            if not len(source) and split == "train":
                raise UserError(
                    f"config data.mixture: {source.name} has no record that its rule fits "
                    f"({why_left_out(source)}); remove the row or annotate its images"
                )
            if source.left_out:
                warn_of((f"left out {why_left_out(source)}",), source.name)
    opened: list[tuple[Source, float]] = []
    for source, rule, weight in rows:
        chosen = source if rule is None else made[str(source.directory), rule.name]
        if len(chosen):
            opened.append((chosen, weight))
    return opened


def dealt_position(index: int, shard: int, shards: int) -> int:
    """Which position of the stream is the `index`-th of a loader shard.

    Every run of `shards` positions goes to all shards once, turned by an amount that only `index` decides: a
    mixture repeats itself, and a shard that took every n-th position might see one dataset alone.
    """
    turn = int.from_bytes(hashlib.blake2b(str(index).encode(), digest_size=8).digest(), "big")
    return index * shards + (shard + turn) % shards


def epochs_of(name: str, weight: Any) -> fractions.Fraction:
    """A weight as an exact number: 0.7 is 7/10, and 1/3 in a recipe is a third.

    Raises:
      UserError: no number from 0.000001 to 1000000.
    """
    number = isinstance(weight, int | float | fractions.Fraction) and not isinstance(weight, bool)
    if not number or not 1 / _FINEST_WEIGHT <= weight <= _FINEST_WEIGHT:
        raise UserError(
            f"config data.mixture: weight {weight!r} of {name!r} must be positive, the epochs of the dataset "
            f"in a pass, from {1 / _FINEST_WEIGHT:f} to {_FINEST_WEIGHT}"
        )
    return fractions.Fraction(weight).limit_denominator(_FINEST_WEIGHT)


class SampleStream:
    """Positions 0, 1, 2, ... to (dataset, record).

    The training order goes through *passes*. A pass has weight times records positions of every dataset, so
    that an integer weight brings every record exactly that often. A fractional one brings it so often on
    average: weight 0.5 brings every record once in two passes. Within a pass the datasets are interleaved as
    `Interleaving` says. Each dataset is shuffled anew for each of its epochs.

    Attributes:
      sources: the datasets.
      weights: the epochs of each of them in a pass.
      length: number of positions; None for the endless training order.
      records: number of distinct records.
      pass_length: positions of a pass, a whole number or a fraction; `records` without weights.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], seed: int, endless: bool) -> None:
        """Builds the order.

        Args:
          sources: datasets and weights.
          seed: of the shuffles.
          endless: True: shuffled every epoch, repeated, mixed by weight. False: every record once, in
            an order that is the same for every seed.

        Raises:
          UserError: a weight is no number of epochs, or leaves a dataset next to nothing of the mixture.
        """
        self.sources = [source for source, _ in sources]
        self.weights = [epochs_of(source.name, weight) for source, weight in sources]
        sizes = [len(source) for source in self.sources]
        self.records = sum(sizes)
        self.length = None if endless else self.records
        described = [[s.name, s.split, len(s), str(w), s.digests()] for s, w in self._rows()]
        self.fingerprint = hashlib.sha256(
            json.dumps([_ORDER, described, seed, endless]).encode()
        ).hexdigest()[:16]
        self._starts = [0, *itertools.accumulate(sizes)]
        if endless:
            shares = [weight * size for weight, size in zip(self.weights, sizes, strict=True)]
            self.pass_length = sum(shares, fractions.Fraction(0))
            for source, share in zip(self.sources, shares, strict=True):
                if share < _LEAST_SHARE * self.pass_length:
                    raise UserError(
                        f"config data.mixture: fewer than one sample in {1 / _LEAST_SHARE} would be of "
                        f"{source.name!r}; raise its weight or remove the row"
                    )
            whole = math.lcm(*(share.denominator for share in shares))
            self._mixed = Interleaving([int(share * whole) for share in shares])
            # Datasets of one size must not walk in step, so each has its own seed.
            self._orders = [
                grain.MapDataset.range(size).seed(_seed(seed, number)).shuffle().repeat()
                for number, size in enumerate(sizes)
            ]
        else:
            self.pass_length = fractions.Fraction(self.records)
            # Neighbours are slices of one scan: in order, the first batches would be a patient or two.
            self._orders = [grain.MapDataset.range(self.records).seed(_HELD_OUT_SEED).shuffle()]

    def _rows(self) -> list[tuple[Source, fractions.Fraction]]:
        return list(zip(self.sources, self.weights, strict=True))

    def address(self, position: int) -> tuple[int, int]:
        """Returns (number of the dataset, record in it)."""
        if self.length is None:
            number, draw = self._mixed[position]
            return number, _shuffled(self._orders[number], draw)
        record = _shuffled(self._orders[0], position)
        number = bisect.bisect_right(self._starts, record) - 1
        return number, record - self._starts[number]

    def name(self, address: tuple[int, int]) -> str:
        """Names a record in messages."""
        source = self.sources[address[0]]
        return f"{source.name}/{source.split} record {address[1]}"


def _shuffled(order: grain.MapDataset[int], position: int) -> int:
    record = order[position]
    assert record is not None  # None is for filtered datasets
    return int(record)


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big") >> 1


def choose_donors(sources: Sequence[Source]) -> dict[tuple[int, int], tuple[int, int]]:
    """For every record with images, whose images it takes when images are exchanged.

    A donor is of another patient and, as far as there is one, has as many images. It may be of another
    modality or region: that is the least a model that looks at its images must notice.

    Returns:
      Address to address; records without a possible donor are missing.
    """
    known = []
    for number, source in enumerate(sources):
        for record in range(len(source)):
            example = _usable(source, record)
            if example is not None and example.images:
                meta = example.meta
                person = str(meta.get("group") or meta.get("patient") or f"record {number} {record}")
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


def _usable(source: Source, record: int) -> Example | None:
    """A record, or None if it cannot be used; the loader names those."""
    try:
        return source[record].validate()
    except UnavailableError:
        raise
    except UserError:
        return None


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
        raise UserError(f"a {example.format} with {len(example.images)} images is not an image-text pair")
    return " ".join(t.text for t in example.turns if t.role == "assistant").replace(IMAGE_MARKER, "").strip()
