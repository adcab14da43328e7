"""The order of samples: datasets mixed by weight, reshuffled every epoch, addressed by position.

A weight is the number of epochs of its dataset in a *pass* of the mixture. Positions are random access, so a
number is the whole state of a loader shard.
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
from typing import Any, cast

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
# Version of the assignment of positions to shards and datasets; part of the fingerprint.
_ORDER = "turned, earliest deadline first"
_MAX_DENOMINATOR = 1_000_000  # of a weight
_MIN_SHARE = fractions.Fraction(1, 10_000_000)  # finding a position takes 1 / share steps

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
      split: 'train' must be in all datasets; any other split in at least one, the rest are left out.
      dialogues: setting of the dialogues of rules.
      seed: seed of the dialogues.

    Returns:
      (source, weight), in the order of the mixture. A rule's source leaves out the records that the rule does
      not fit, with a notice of their number and the reason.

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
    """The datasets of a folder and their variants, for messages."""
    try:
        return ", ".join(path.relative_to(root).as_posix() for path in datasets_in(root))
    except UserError:
        return "none"


def _under_rules(
    rows: Sequence[tuple[ExampleSource, Rule | None, float]], split: str, setting: Setting | None, seed: int
) -> list[tuple[Source, float]]:
    """Applies rules; the records of a dataset are read once for all its rules."""
    ruled: dict[str, list[tuple[ExampleSource, Rule]]] = collections.defaultdict(list)
    for source, rule, _ in rows:
        if rule is not None:
            ruled[str(source.directory)].append((source, rule))
    if ruled and setting is None:
        raise UserError(
            "config data.annotations is empty, but data.mixture has rules, which make dialogues of "
            "annotations; set it"
        )
    made: dict[tuple[str, str], DialogueSource] = {}
    for folder, pairs in ruled.items():
        assert setting is not None  # checked above
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
    opened = [
        (source if rule is None else made[str(source.directory), rule.name], weight)
        for source, rule, weight in rows
    ]
    return [(source, weight) for source, weight in opened if len(source)]


def dealt_position(index: int, shard: int, shards: int) -> int:
    """The position in the stream of the `index`-th sample of a loader shard.

    Each run of `shards` positions goes to all shards once, rotated by a hash of `index`: mixtures are
    periodic, so a shard of every n-th position might see a single dataset.
    """
    turn = int.from_bytes(hashlib.blake2b(str(index).encode(), digest_size=8).digest(), "big")
    return index * shards + (shard + turn) % shards


def epochs_of(name: str, weight: Any) -> fractions.Fraction:
    """A weight as an exact fraction: 0.7 is 7/10, and 1/3 in a recipe is a third.

    Raises `UserError` unless it is a number from 0.000001 to 1000000.
    """
    number = isinstance(weight, int | float | fractions.Fraction) and not isinstance(weight, bool)
    if not number or not 1 / _MAX_DENOMINATOR <= weight <= _MAX_DENOMINATOR:
        raise UserError(
            f"config data.mixture: weight {weight!r} of {name!r} must be positive, the epochs of the dataset "
            f"in a pass, from {1 / _MAX_DENOMINATOR:f} to {_MAX_DENOMINATOR}"
        )
    return fractions.Fraction(weight).limit_denominator(_MAX_DENOMINATOR)


class SampleStream:
    """Maps positions 0, 1, 2, ... to (dataset, record).

    The training order is a sequence of *passes*, with weight x records positions of each dataset. An integer
    weight yields every record exactly that often; weight 0.5 yields every record once in two passes. Within a
    pass, datasets are interleaved by `Interleaving`. Each dataset is reshuffled for each of its epochs.

    Attributes:
      sources: the datasets.
      weights: epochs of each in a pass.
      length: number of positions; None for the endless training order.
      records: number of distinct records.
      pass_length: positions of a pass, possibly fractional; `records` without weights.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], seed: int, endless: bool) -> None:
        """Builds the order.

        Args:
          sources: datasets and weights.
          seed: seed of the shuffles.
          endless: True for the training order. False yields every record once, in an order that does not
            depend on the seed.

        Raises:
          UserError: a weight is invalid, or the share of a dataset is too small.
        """
        self.sources = [source for source, _ in sources]
        self.weights = [epochs_of(source.name, weight) for source, weight in sources]
        sizes = [len(source) for source in self.sources]
        self.records = sum(sizes)
        self.length = None if endless else self.records
        described = [
            [source.name, source.split, len(source), str(weight), source.digests()]
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        self.fingerprint = hashlib.sha256(
            json.dumps([_ORDER, described, seed, endless]).encode()
        ).hexdigest()[:16]
        self._starts = [0, *itertools.accumulate(sizes)]
        if endless:
            shares = [weight * size for weight, size in zip(self.weights, sizes, strict=True)]
            self.pass_length = sum(shares, fractions.Fraction(0))
            for source, share in zip(self.sources, shares, strict=True):
                if share < _MIN_SHARE * self.pass_length:
                    raise UserError(
                        f"config data.mixture: fewer than one sample in {1 / _MIN_SHARE} would be of "
                        f"{source.name!r}; raise its weight or remove the row"
                    )
            whole = math.lcm(*(share.denominator for share in shares))
            self._mixed = Interleaving([int(share * whole) for share in shares])
            # Separate seeds, so that datasets of equal size have different orders.
            self._orders = [
                grain.MapDataset.range(size).seed(_seed(seed, number)).shuffle().repeat()
                for number, size in enumerate(sizes)
            ]
        else:
            self.pass_length = fractions.Fraction(self.records)
            # Shuffled, as consecutive records are often slices of one patient.
            self._orders = [grain.MapDataset.range(self.records).seed(_HELD_OUT_SEED).shuffle()]

    def address(self, position: int) -> tuple[int, int]:
        """(number of the dataset, record in it) at a position."""
        if self.length is None:
            number, draw = self._mixed[position]
            return number, int(cast(int, self._orders[number][draw]))
        record = int(cast(int, self._orders[0][position]))
        number = bisect.bisect_right(self._starts, record) - 1
        return number, record - self._starts[number]

    def name(self, address: tuple[int, int]) -> str:
        """Name of a record in messages."""
        source = self.sources[address[0]]
        return f"{source.name}/{source.split} record {address[1]}"


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big") >> 1


def choose_donors(sources: Sequence[Source]) -> dict[tuple[int, int], tuple[int, int]]:
    """For every record with images, the donor whose images replace them.

    A donor is of another patient and, if possible, has the same number of images. It may be of another
    modality or region, as a model that uses its images must at least notice that.

    Returns:
      Address → address; records without a possible donor are missing.
    """
    candidates = []
    for number, source in enumerate(sources):
        for record in range(len(source)):
            try:
                example = source[record].validate()
            except UnavailableError:
                raise
            except UserError:  # the loader reports it
                continue
            if example.images:
                meta = example.meta
                patient = str(meta.get("group") or meta.get("patient") or f"record {number} {record}")
                candidates.append(_Candidate((number, record), len(example.images), patient))
    by_images: dict[int, list[_Candidate]] = collections.defaultdict(list)
    for candidate in candidates:
        by_images[candidate.images].append(candidate)
    donors = {}
    for place, candidate in enumerate(candidates):
        donor = _other_patient(candidate, by_images[candidate.images]) or _other_patient(
            candidate, candidates
        )
        if donor is None and len(candidates) > 1:
            donor = candidates[place - 1]
        if donor is not None:
            donors[candidate.address] = donor.address
    return donors


@dataclasses.dataclass(frozen=True)
class _Candidate:
    address: tuple[int, int]
    images: int
    patient: str


def _other_patient(own: _Candidate, ring: Sequence[_Candidate]) -> _Candidate | None:
    """The first of another patient, starting half-way round, which spreads donors over all records."""
    start = bisect.bisect_left(ring, own.address, key=lambda one: one.address) + len(ring) // 2
    rotated = (ring[(start + step) % len(ring)] for step in range(len(ring)))
    return next((other for other in rotated if other.patient != own.patient), None)


def pair_caption(example: Example) -> str:
    """The caption of an image-text pair; raises `UserError` if the example is not one."""
    if example.format not in ("pair", "caption") or len(example.images) != 1:
        raise UserError(f"a {example.format} with {len(example.images)} images is not an image-text pair")
    return " ".join(t.text for t in example.turns if t.role == "assistant").replace(IMAGE_MARKER, "").strip()
