"""The order of datasets in a mixture: exact shares, random access to any position, no stored list.

This is the chairman assignment problem (Tijdeman, 1980, "The chairman assignment problem", Discrete
Mathematics 32): choose one of k datasets at every position so that no dataset is ever far from its share.
With D = 1 - 1 / (2k - 2), an order exists in which the draws of every dataset before every position differ
from its share by at most D, and no smaller D works for all shares.

The order is computed as a schedule. The bound gives each draw of a dataset a first position (its release)
and a last one (its deadline). Among the released draws, the one with the earliest deadline is next; this rule
meets all deadlines if any order does.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vilam3_jax.data.caches import ByteLRU

_BLOCK = 1024  # positions computed at once
_BLOCKS_KEPT = 64
_INT64_SAFE = 1 << 62


class _Block(NamedTuple):
    """A run of positions."""

    chosen: np.ndarray  # int32 [n], dataset at each position
    draws: np.ndarray  # int64 [n], index of the draw within its dataset, from the start of the period


class Interleaving:
    """Maps positions 0, 1, 2, ... to (dataset, draw); thread-safe, and small when pickled.

    Before position t, dataset i of share p_i = rates[i] / sum(rates) was drawn c_i(t) times, with
    |c_i(t) - p_i t| <= `bound` < 1. Any window of n positions therefore contains p_i n draws up to an error
    of 2 * `bound`, which is exactly one for two datasets; every period contains exactly `rates` draws. This
    cannot be improved for all shares: for three datasets of different shares, all windows can be within one
    draw only for the shares 4 : 2 : 1 (Fraenkel's conjecture, proven for up to seven datasets).

    Attributes:
      rates: draws of each dataset per period, without common divisor.
      period: their sum, after which the order repeats.
      bound: D of the module docstring.
    """

    def __init__(self, rates: Sequence[int]) -> None:
        """Stores the draws per dataset; raises `ValueError` unless all are positive."""
        if not rates or min(rates) < 1:
            raise ValueError(f"rates {list(rates)} must be positive")
        common = math.gcd(*rates)
        self.rates = tuple(rate // common for rate in rates)
        self.period = sum(self.rates)
        self._parts = max(2, 2 * len(rates) - 2)  # 1 / (1 - D)
        self.bound = 1 - 1 / self._parts if len(rates) > 1 else 0.0
        self._blocks: ByteLRU[_Block] = ByteLRU(_BLOCKS_KEPT, lambda block: 1)
        # Number of the block after the last scheduled one, and draws of each dataset before it.
        self._last = (0, (0,) * len(rates))

    def __reduce__(self) -> tuple[Any, ...]:
        return Interleaving, (self.rates,)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns (dataset, index of the draw within the dataset, counted from position 0)."""
        if position < 0:
            raise IndexError(f"position {position} of an order that starts at 0")
        turn, place = divmod(position, self.period)
        number, offset = divmod(place, _BLOCK)
        block = self._blocks.get(number, lambda: self._schedule(number))
        dataset = int(block.chosen[offset])
        return dataset, turn * self.rates[dataset] + int(block.draws[offset])

    def counts(self, position: int) -> tuple[int, ...]:
        """Returns the number of draws of each dataset before a position."""
        turn, place = divmod(position, self.period)
        drawn = self._counts(place)
        return tuple(turn * rate + count for rate, count in zip(self.rates, drawn, strict=True))

    def _release(self, dataset: int, draw: int) -> int:
        """First position of a draw: draw + 1 - (position + 1) * share <= D."""
        scaled = (draw * self._parts + 1) * self.period
        return -(-scaled // (self._parts * self.rates[dataset])) - 1

    def _deadline(self, dataset: int, draw: int) -> int:
        """Last position of a draw: position * share - draw <= D."""
        return ((draw + 1) * self._parts - 1) * self.period // (self._parts * self.rates[dataset])

    def _schedule(self, number: int) -> _Block:
        """Schedules a block by earliest deadline first; ties go to the first dataset."""
        start = number * _BLOCK
        following, counts = self._last
        drawn = list(counts if following == number else self._counts(start))
        length = min(_BLOCK, self.period - start)
        chosen, draws = np.empty(length, np.int32), np.empty(length, np.int64)
        waiting = [(self._release(i, draw), i) for i, draw in enumerate(drawn)]
        heapq.heapify(waiting)
        ready: list[tuple[int, int]] = []
        for offset in range(length):
            while waiting and waiting[0][0] <= start + offset:
                _, i = heapq.heappop(waiting)
                heapq.heappush(ready, (self._deadline(i, drawn[i]), i))
            _, i = heapq.heappop(ready)
            chosen[offset], draws[offset] = i, drawn[i]
            drawn[i] += 1
            heapq.heappush(waiting, (self._release(i, drawn[i]), i))
        self._last = (number + 1, tuple(drawn))
        return _Block(chosen, draws)

    def _counts(self, position: int) -> tuple[int, ...]:
        """Returns the draws of each dataset before a position of the period, without running the schedule.

        Draws with a past deadline were made. Each dataset has at most one other released draw, the open one.
        The sets of draws that fit before the position are independent in a transversal matroid, and earliest
        deadline first makes the set that a greedy choice by deadline makes. A set fits if, for every earlier
        position s, no more of its draws are released from s on than there are positions. This can fail only
        for s from the first open release on.
        """
        due, opened = [], []
        for i, rate in enumerate(self.rates):
            ahead, scale = self._parts * position * rate, self._parts * self.period
            slack = (self._parts - 1) * self.period
            due.append(max(0, -((slack - ahead) // scale)))
            if (ahead + slack) // scale > due[i]:
                opened.append((self._deadline(i, due[i]), i, self._release(i, due[i])))
        missing = position - sum(due)
        if not missing:
            return tuple(due)
        first = min(release for _, _, release in opened)
        room = self._room(first, position, due)
        for _, i, release in sorted(opened):
            if missing and room[: release - first + 1].min() >= 1:
                room[: release - first + 1] -= 1
                due[i] += 1
                missing -= 1
        return tuple(due)

    def _room(self, first: int, position: int, due: Sequence[int]) -> np.ndarray:
        """Returns for each s >= `first` the positions from s to `position` minus due draws released there."""
        length = position - first
        largest = self._parts * (length + 1) * max(self.rates) + 2 * self._parts * self.period
        kind = np.int64 if largest < _INT64_SAFE else object
        room = np.arange(length, 0, -1).astype(kind)
        steps = np.arange(length).astype(kind)
        scale = self._parts * self.period
        for i, rate in enumerate(self.rates):
            # Draws released before s, floor(s * share + D), relative to the due ones.
            offset = self._parts * first * rate + (self._parts - 1) * self.period - due[i] * scale
            lacking = -((steps * (self._parts * rate) + offset) // scale)
            room -= np.maximum(lacking, 0)
        return room
