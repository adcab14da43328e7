"""Perceptual hashes of images, and the search for near duplicates among them.

A hash tells which low frequencies of the discrete cosine transform are above their median (Zauner,
Implementation and Benchmarking of Perceptual Image Hash Functions, 2010). Each image has hashes of itself and
of parts of it, so that a copy whose borders were cut is found too. A coarse hash of 63 bits finds candidates,
a fine one of 255 bits decides.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from PIL import Image
from scipy.fft import dct

# Shares of width and height that are cut at the left, top, right and bottom: none, all sides, one side, two
# sides that meet.
MARGINS = (
    (0.0, 0.0, 0.0, 0.0),
    *((share, share, share, share) for share in (0.02, 0.04, 0.06, 0.08)),
    *(tuple(0.04 * (side == cut) for side in range(4)) for cut in range(4)),
    *(tuple(0.04 * (side in (cut, (cut + 1) % 4)) for side in range(4)) for cut in range(4)),
)

# Of 255 bits. Copies that were compressed again, scaled or cut by up to 5 % differ by at most 36, films and
# slices of different patients by at least 60 (docs/leaks.md).
NEAR_DISTANCE = 40

_SIDE = 64
_REDUCED = 256
_COARSE, _FINE = 8, 16
_COSINES = np.asarray(dct(np.eye(_SIDE, dtype=np.float32), axis=0, norm="ortho"))[:_FINE]
_FLAT = 2.0  # standard deviation in grey levels below which an image has no structure to compare
_CHUNKS, _CHUNK_BITS = 4, 16
_MOST_CANDIDATES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What is kept of an image.

    Attributes:
      key: content key of its pixels.
      coarse: uint64 [V], a hash for each margin; empty for an image without structure.
      fine: uint64 [V, 4].
    """

    key: str
    coarse: np.ndarray
    fine: np.ndarray


def fingerprint(image: np.ndarray, key: str) -> Fingerprint:
    """Hashes an image.

    Args:
      image: [H, W, 3] uint8.
      key: of its pixels.
    """
    grey = Image.fromarray(image).convert("L")
    reduced = grey.resize((_REDUCED, _REDUCED), Image.Resampling.BOX if min(grey.size) >= _REDUCED else None)
    if np.asarray(reduced).std() < _FLAT:
        return Fingerprint(key, np.zeros(0, np.uint64), np.zeros((0, 4), np.uint64))
    coarse, fine = zip(*(_hashes(reduced, margin) for margin in MARGINS), strict=True)
    return Fingerprint(key, np.array(coarse, np.uint64), np.array(fine, np.uint64))


def _hashes(image: Image.Image, margins: tuple[float, ...]) -> tuple[np.uint64, np.ndarray]:
    left, top, right, bottom = (_REDUCED * margin for margin in margins)
    box = (left, top, _REDUCED - right, _REDUCED - bottom)
    small = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, box=box)
    frequencies = _COSINES @ np.asarray(small, np.float32) @ _COSINES.T
    return _packed(frequencies[:_COARSE, :_COARSE])[0], _packed(frequencies)


def _packed(frequencies: np.ndarray) -> np.ndarray:
    values = frequencies.ravel()[1:]  # the first is the mean brightness
    bits = np.append(values > np.median(values), False)
    return np.packbits(bits).view(np.uint64)


class NearIndex:
    """Fingerprints by their coarse hashes, four buckets of 16 bits each.

    A query looks into the buckets of its own bits and into those that differ by one bit. So all images whose
    coarse hash differs by at most 7 bits are candidates, and the time does not grow with the number of pairs.
    """

    def __init__(self, fingerprints: list[Fingerprint]) -> None:
        """Indexes images; those without structure never match."""
        known = [(place, mark) for place, mark in enumerate(fingerprints) if len(mark.coarse)]
        self._places = np.array([place for place, _ in known], np.int64)
        coarse = np.array([mark.coarse for _, mark in known], np.uint64).reshape(-1, len(MARGINS))
        fine = np.array([mark.fine for _, mark in known], np.uint64).reshape(-1, len(MARGINS), 4)
        self._whole = _Buckets(coarse[:, :1], fine[:, :1])
        self._all = _Buckets(coarse, fine)

    def near(self, queries: list[Fingerprint], distance: int) -> dict[tuple[int, int], int]:
        """Pairs of near images.

        Whole images are compared with whole and cut ones, in both directions.

        Args:
          queries: images to look for.
          distance: bits of 255 by which fine hashes may differ.

        Returns:
          (index of the query, index of the image) → distance.
        """
        known = [(place, mark) for place, mark in enumerate(queries) if len(mark.coarse)]
        if not known or not len(self._places):
            return {}
        places = np.array([place for place, _ in known], np.int64)
        coarse = np.array([mark.coarse for _, mark in known], np.uint64)
        fine = np.array([mark.fine for _, mark in known], np.uint64)
        found: dict[tuple[int, int], int] = {}
        for buckets, variants in ((self._all, slice(0, 1)), (self._whole, slice(1, None))):
            for query, entry, bits in buckets.near(coarse[:, variants], fine[:, variants], distance):
                pair = int(places[query]), int(self._places[entry])
                found[pair] = min(bits, found.get(pair, bits))
        return found


class _Buckets:
    """Hashes [N, V], found by chunks of 16 bits."""

    def __init__(self, coarse: np.ndarray, fine: np.ndarray) -> None:
        self._variants = max(coarse.shape[1], 1)
        self._fine = fine.reshape(-1, 4)
        self._tables = []
        for chunk in _chunks(coarse.ravel()):
            order = np.argsort(chunk, kind="stable")
            self._tables.append((order, np.searchsorted(chunk[order], np.arange((1 << _CHUNK_BITS) + 1))))

    def near(self, coarse: np.ndarray, fine: np.ndarray, distance: int) -> set[tuple[int, int, int]]:
        """(query, image, distance) of near hashes among [Q, W] queries."""
        width = coarse.shape[1]
        fine = fine.reshape(-1, 4)
        flips = np.array([0, *(1 << bit for bit in range(_CHUNK_BITS))])
        found: set[tuple[int, int, int]] = set()
        for chunk, (order, starts) in zip(_chunks(coarse.ravel()), self._tables, strict=True):
            probes = (chunk[:, None] ^ flips).ravel()
            queries = np.repeat(np.arange(len(chunk)), len(flips))
            first, counts = starts[probes], starts[probes + 1] - starts[probes]
            for part in _parts(counts):
                repeated = np.repeat(np.arange(len(counts))[part], counts[part])
                within = np.arange(len(repeated)) - np.repeat(
                    np.cumsum(counts[part]) - counts[part], counts[part]
                )
                entries, asked = order[first[repeated] + within], queries[repeated]
                bits = np.bitwise_count(self._fine[entries] ^ fine[asked]).sum(axis=1)
                close = bits <= distance
                found.update(
                    zip(
                        (asked[close] // width).tolist(),
                        (entries[close] // self._variants).tolist(),
                        bits[close].tolist(),
                        strict=True,
                    )
                )
        return found


def _chunks(hashes: np.ndarray) -> list[np.ndarray]:
    mask = np.uint64((1 << _CHUNK_BITS) - 1)
    return [((hashes >> np.uint64(_CHUNK_BITS * chunk)) & mask).astype(np.int64) for chunk in range(_CHUNKS)]


def _parts(counts: np.ndarray) -> list[slice]:
    """Slices of the probes, each with a bounded number of candidates."""
    ends = np.cumsum(counts)
    borders = np.searchsorted(ends, np.arange(_MOST_CANDIDATES, int(ends[-1]), _MOST_CANDIDATES))
    edges = np.unique([0, *borders.tolist(), len(counts)])
    return [slice(low, high) for low, high in itertools.pairwise(edges.tolist())]
