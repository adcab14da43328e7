"""Tests of the order of datasets in a mixture: exact counts, bounded windows, random access."""

from __future__ import annotations

import collections
import itertools
import math
import pickle
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.data.interleave import Interleaving
from vilam3_jax.data.stream import SampleStream, epochs_of
from vilam3_jax.errors import UserError

RATES = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.lists(st.sampled_from([1, 2, 50, 400]), min_size=2, max_size=5),
)
# VILA-M3's table: number of records of each dataset, and repetitions per pass.
STAGE4 = {
    "usmle": (10_178, 10), "radvqa": (25_124, 4), "slake": (23_888, 4), "pathvqa": (26_034, 4),
    "mimic_vqa": (129_232, 2), "report": (270_000, 1), "report_expert": (270_000, 1),
    "vista3d": (50_000, 8), "brats": (15_000, 16),
}  # fmt: skip


class Records:
    """The interface of a dataset that a stream needs."""

    split = "train"

    def __init__(self, name: str, size: int) -> None:
        self.name, self._size = name, size

    def __len__(self) -> int:
        return self._size

    def digests(self) -> list[str]:
        return [self.name]


def stream(*rows: tuple[int, float], seed: int = 0, endless: bool = True) -> SampleStream:
    sources = [(Records(f"set{number}", size), weight) for number, (size, weight) in enumerate(rows)]
    return SampleStream(sources, seed, endless)  # type: ignore[arg-type]


def drawn(order: Interleaving, length: int) -> np.ndarray:
    """Returns the draws of each dataset before each position, [length + 1, k]."""
    chosen = np.array([order[position][0] for position in range(length)])
    made = chosen[:, None] == np.arange(len(order.rates))
    return np.concatenate([np.zeros((1, len(order.rates)), int), np.cumsum(made, axis=0)])


@settings(deadline=None, max_examples=60)
@given(RATES)
def test_every_prefix_is_within_the_bound_and_every_period_is_exact(rates: list[int]) -> None:
    order = Interleaving(rates)
    counts = drawn(order, min(order.period, 1200))
    share = np.array(order.rates) / order.period
    off = np.abs(counts - np.arange(len(counts))[:, None] * share)
    assert off.max() <= order.bound + 1e-9 < 1 + 1e-9
    if order.period <= 1200:
        assert tuple(counts[-1]) == order.rates
    common = math.gcd(*rates)
    assert order.rates == tuple(rate // common for rate in rates)


@settings(deadline=None, max_examples=60)
@given(RATES, st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_position_does_not_depend_on_what_was_asked_before(rates, turns, rng: random.Random) -> None:
    walked = Interleaving(rates)
    length = min(walked.period, 1500)
    expected = [walked[position] for position in range(length)]
    place = rng.randrange(length)
    fresh = Interleaving(rates)
    dataset, draw = fresh[turns * walked.period + place]
    assert (dataset, draw - turns * walked.rates[dataset]) == expected[place]
    before = collections.Counter(chosen for chosen, _ in expected[:place])
    assert fresh.counts(place) == tuple(before[i] for i in range(len(rates)))
    assert draw == turns * walked.rates[dataset] + before[dataset]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300))
def test_every_window_of_two_datasets_is_within_one(left: int, right: int) -> None:
    order = Interleaving([left, right])
    counts = drawn(order, min(2 * order.period, 600))[:, 0]
    share = order.rates[0] / order.period
    for length in (1, 2, 3, 7, 20, 50):
        windows = counts[length:] - counts[:-length]
        assert np.abs(windows - length * share).max(initial=0) <= 1 + 1e-9


def test_a_rare_dataset_among_large_ones() -> None:
    order = Interleaving([1, 999_983, 1_000_003, 40])
    assert order[0] == Interleaving(order.rates)[0]
    for position in (12_345, 1_000_000, 1_999_999):
        far = Interleaving(order.rates)
        counts = np.array(far.counts(position))
        share = np.array(order.rates) / order.period
        assert counts.sum() == position and np.abs(counts - position * share).max() <= order.bound
        dataset, draw = far[position]
        assert draw == counts[dataset]
        assert far.counts(position + 1) == tuple(counts + (np.arange(4) == dataset))


def test_rates_beyond_64_bits() -> None:
    order = Interleaving([10**18 + 9, 3 * 10**17 + 1, 7 * 10**14])
    position = 10**18
    counts = order.counts(position)
    assert sum(counts) == position
    assert order[position][1] == counts[order[position][0]]


def test_it_is_small_when_pickled_and_the_same_afterwards() -> None:
    order = Interleaving([5, 3, 2])
    expected = [order[position] for position in range(50)]
    data = pickle.dumps(order)
    assert len(data) < 300 and [pickle.loads(data)[n] for n in range(50)] == expected  # noqa: S301 (our own)


@pytest.mark.parametrize("rates", [[], [0], [1, -1]])
def test_rates_must_be_positive(rates) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Interleaving(rates)
    with pytest.raises(IndexError, match="position -1"):
        Interleaving([1])[-1]


def test_a_pass_brings_every_record_as_often_as_its_weight() -> None:
    order = stream((7, 3), (23, 1), (10, 2.5), (9, 1 / 3))
    assert order.pass_length == 7 * 3 + 23 + 25 + 3
    length = int(order.pass_length)
    counts = collections.Counter(order.address(position) for position in range(length))
    assert {counts[0, record] for record in range(7)} == {3}
    assert {counts[1, record] for record in range(23)} == {1}
    assert {counts[2, record] for record in range(10)} == {2, 3}
    counts.update(order.address(position) for position in range(length, 6 * length))
    assert {counts[2, record] for record in range(10)} == {15}
    assert {counts[3, record] for record in range(9)} == {2}


def test_fractions_of_a_record_are_made_up_for_in_later_passes() -> None:
    order = stream((13, 0.7), (5, 0.1))
    assert order.pass_length == 13 * epochs_of("a", 0.7) + epochs_of("b", 0.5)
    counts = collections.Counter(order.address(position) for position in range(int(10 * order.pass_length)))
    assert {counts[0, record] for record in range(13)} == {7}
    assert {counts[1, record] for record in range(5)} == {1}


def test_each_epoch_of_each_dataset_has_its_own_order() -> None:
    order = stream((40, 1), (40, 1))
    made: dict[int, list[int]] = {0: [], 1: []}
    for position in range(160):
        dataset, record = order.address(position)
        made[dataset].append(record)
    parts = [made[0][:40], made[0][40:], made[1][:40], made[1][40:]]
    assert all(sorted(part) == list(range(40)) for part in parts)
    assert all(left != right for left, right in itertools.combinations(parts, 2))
    other = stream((40, 1), (40, 1), seed=1)
    assert made[0] != [record for dataset, record in map(other.address, range(160)) if not dataset]


def test_held_out_data_come_once_whatever_their_weights() -> None:
    order = stream((5, 3), (8, 0.5), endless=False)
    addresses = [order.address(position) for position in range(order.length or 0)]
    assert sorted(addresses) == [(0, n) for n in range(5)] + [(1, n) for n in range(8)]
    assert addresses != sorted(addresses)


def test_the_published_mixture_of_stage_4() -> None:
    """819,456 records, 1,840,428 samples per pass: exact counts, and every prefix within one sample."""
    begun = time.monotonic()
    order = stream(*STAGE4.values())
    first = [order.address(position) for position in (0, 920_000, 1_840_427)]
    assert time.monotonic() - begun < 2 and len(first) == 3
    assert order.records == 819_456 and order.pass_length == 1_840_428
    mixed = order._mixed
    assert mixed.counts(1_840_428) == tuple(size * weight for size, weight in STAGE4.values())
    # A period is a quarter of the pass; the schedule is computed once, block by block.
    chosen = np.concatenate([mixed._schedule(n).chosen for n in range(-(-mixed.period // 1024))])
    assert len(chosen) == mixed.period == 460_107
    share = np.array(mixed.rates) / mixed.period
    for dataset in range(len(STAGE4)):
        counts = np.concatenate([[0], np.cumsum(chosen == dataset)])
        off = counts - np.arange(len(counts)) * share[dataset]
        assert counts[-1] == mixed.rates[dataset]
        assert np.abs(off).max() <= mixed.bound + 1e-6  # every prefix
        assert off.max() - off.min() < 2  # every window


@pytest.mark.slow
def test_every_record_of_the_published_mixture_comes_as_often_as_its_weight() -> None:
    order = stream(*STAGE4.values())
    seen = [np.zeros(size, int) for size, _ in STAGE4.values()]
    for position in range(1_840_428):
        dataset, record = order.address(position)
        seen[dataset][record] += 1
    for counts, (_, weight) in zip(seen, STAGE4.values(), strict=True):
        assert (counts == weight).all()


def test_huge_datasets_open_at_once() -> None:
    begun = time.monotonic()
    order = stream((2**31, 1), (1000, 1), (10**9, 0.7))
    for position in (0, 10**6, 10**12):
        dataset, record = order.address(position)
        assert 0 <= record < len(order.sources[dataset])
    assert time.monotonic() - begun < 2
    with pytest.raises(UserError, match=r"one sample in 10000000 would be of 'set1'; raise its weight"):
        stream((2**31, 1), (100, 1))


def test_the_fingerprint_knows_weights_seed_and_kind() -> None:
    made = [
        stream((5, 1), (6, 1)), stream((5, 1), (6, 2)), stream((5, 1), (6, 1), seed=1),
        stream((5, 1), (6, 1), endless=False),
    ]  # fmt: skip
    assert len({order.fingerprint for order in made}) == 4
    assert stream((5, 1), (6, 1)).fingerprint == stream((5, 1.0), (6, 1.0)).fingerprint


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "2", None, 1e-9, 1e9])
def test_weights_that_are_none_are_named(weight) -> None:
    with pytest.raises(UserError, match=r"weight .* of 'set0' must be positive"):
        epochs_of("set0", weight)
