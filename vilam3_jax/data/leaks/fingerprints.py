"""Perceptual image hashes and near-duplicate search.

A hash states which low-frequency DCT coefficients are above their median (Zauner, Implementation and
Benchmarking of Perceptual Image Hash Functions, 2010). Each image has hashes of several crops, so cropped
copies match. A coarse hash of 63 bits selects candidates, a fine hash of 255 bits decides.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from PIL import Image
from scipy.fft import dct

# Crops, as shares of width and height at the left, top, right and bottom: none, all sides, one side, two
# adjacent sides.
MARGINS = (
    (0.0, 0.0, 0.0, 0.0),
    *((share, share, share, share) for share in (0.02, 0.04, 0.06, 0.08)),
    *(tuple(0.04 * (side == cut) for side in range(4)) for cut in range(4)),
    *(tuple(0.04 * (side in (cut, (cut + 1) % 4)) for side in range(4)) for cut in range(4)),
)

# Of 255 bits. Copies that were recompressed, scaled or cropped by up to 5 % differ in at most 36, films and
# slices of different patients in at least 60 (docs/leaks.md).
NEAR_DISTANCE = 40

_SIDE = 64
_REDUCED = 256
_COARSE, _FINE = 8, 16
_COSINES = np.asarray(dct(np.eye(_SIDE, dtype=np.float32), axis=0, norm="ortho"))[:_FINE]
_FLAT = 2.0  # an image whose grey levels have a smaller standard deviation has no structure
_CHUNKS, _CHUNK_BITS = 4, 16
_MAX_CANDIDATES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Perceptual hashes of an image."""

    key: str  # content key of the pixels
    coarse: np.ndarray  # uint64 [V], one hash per crop in `MARGINS`; empty for an image without structure
    fine: np.ndarray  # uint64 [V, 4]


def fingerprint(image: np.ndarray, key: str) -> Fingerprint:
    """Hashes an image [H, W, 3] uint8 with content key `key`."""
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
    values = frequencies.ravel()[1:]  # without the DC coefficient
    bits = np.append(values > np.median(values), False)
    return np.packbits(bits).view(np.uint64)


class NearIndex:
    """Looks up fingerprints by coarse hash, in four tables of 16-bit buckets.

    A query probes the buckets that differ from its own bits in at most one bit. This finds all images whose
    coarse hash differs by at most 7 bits, in a time that does not grow with the number of pairs.
    """

    def __init__(self, fingerprints: list[Fingerprint]) -> None:
        """Indexes images. Images without structure never match."""
        self._indices, coarse, fine = _stacked(fingerprints)
        self._uncropped = _Buckets(coarse[:, :1], fine[:, :1])
        self._all = _Buckets(coarse, fine)

    def near(self, queries: list[Fingerprint], distance: int) -> dict[tuple[int, int], int]:
        """Finds near duplicates: uncropped images match uncropped and cropped ones, in both directions.

        Returns (query index, image index) -> Hamming distance of the fine hashes, at most `distance` of 255.
        """
        indices, coarse, fine = _stacked(queries)
        if not len(indices) or not len(self._indices):
            return {}
        found: dict[tuple[int, int], int] = {}
        for buckets, variants in ((self._all, slice(0, 1)), (self._uncropped, slice(1, None))):
            for query, image, bits in buckets.near(coarse[:, variants], fine[:, variants], distance):
                pair = int(indices[query]), int(self._indices[image])
                found[pair] = min(bits, found.get(pair, bits))
        return found


def _stacked(fingerprints: list[Fingerprint]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns indices [N], coarse hashes [N, V] and fine hashes [N, V, 4] of images with structure."""
    hashed = [(index, image) for index, image in enumerate(fingerprints) if len(image.coarse)]
    indices = np.array([index for index, _ in hashed], np.int64)
    coarse = np.array([image.coarse for _, image in hashed], np.uint64).reshape(-1, len(MARGINS))
    fine = np.array([image.fine for _, image in hashed], np.uint64).reshape(-1, len(MARGINS), 4)
    return indices, coarse, fine


class _Buckets:
    """Hashes [N, V], indexed by their 16-bit chunks."""

    def __init__(self, coarse: np.ndarray, fine: np.ndarray) -> None:
        self._variants = max(coarse.shape[1], 1)
        self._fine = fine.reshape(-1, 4)
        self._tables = []
        for chunk in _chunks(coarse.ravel()):
            order = np.argsort(chunk, kind="stable")
            self._tables.append((order, np.searchsorted(chunk[order], np.arange((1 << _CHUNK_BITS) + 1))))

    def near(self, coarse: np.ndarray, fine: np.ndarray, distance: int) -> set[tuple[int, int, int]]:
        """Returns (query, image, distance) of near hashes for queries [Q, W]."""
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
    """Splits the probes into slices with a bounded number of candidates."""
    ends = np.cumsum(counts)
    borders = np.searchsorted(ends, np.arange(_MAX_CANDIDATES, int(ends[-1]), _MAX_CANDIDATES))
    edges = np.unique([0, *borders.tolist(), len(counts)])
    return [slice(low, high) for low, high in itertools.pairwise(edges.tolist())]
