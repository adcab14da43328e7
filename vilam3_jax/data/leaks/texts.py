"""Detection of shared text by word n-grams ("runs").

A text is represented by its runs of 13 words, the length used since GPT-3 (Brown et al., Language Models are
Few-Shot Learners, appendix C); a shorter text by all its words.
"""

from __future__ import annotations

import functools
import hashlib
import re

import numpy as np

RUN = 13
_MIN_WORDS = 4
_FACTOR = 0x9E3779B97F4A7C15  # odd, so multiplication is invertible
_POWERS = np.array([pow(_FACTOR, power, 1 << 64) for power in range(RUN)], np.uint64)
_WORD = re.compile(r"\w+")


def run_hashes(text: str) -> np.ndarray:
    """Hashes the runs of a text, ignoring case and punctuation.

    uint64 [R], sorted and unique; empty for fewer than 4 words.
    """
    words = _WORD.findall(text.casefold())
    if len(words) < _MIN_WORDS:
        return np.zeros(0, np.uint64)
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    if len(words) < RUN:
        return np.array([(hashes * _POWERS[: len(words)]).sum(dtype=np.uint64) + np.uint64(len(words))])
    windows = np.lib.stride_tricks.sliding_window_view(hashes, RUN)
    return np.unique((windows * _POWERS).sum(axis=1, dtype=np.uint64))


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")


class TextIndex:
    """Counts how often a training set contains the runs of an evaluation set.

    Memory grows with the evaluation set only.
    """

    def __init__(self, texts: list[tuple[int, np.ndarray]]) -> None:
        """Indexes (record, `run_hashes`) of every text."""
        self._owners = [record for record, _ in texts]
        joined = np.concatenate([hashes for _, hashes in texts]) if texts else np.zeros(0, np.uint64)
        self._runs, run_ids = np.unique(joined, return_inverse=True)
        self._texts = np.split(run_ids, np.cumsum([len(hashes) for _, hashes in texts[:-1]], dtype=int))
        self.reset()

    def reset(self) -> None:
        """Clears the counts, for another training set."""
        self._counts = np.zeros(len(self._runs), np.int32)
        self._first = np.full(len(self._runs), -1, np.int64)

    def count(self, record: int, texts: tuple[np.ndarray, ...]) -> None:
        """Counts the runs of a training record, each at most once."""
        if not texts or not len(self._runs):
            return
        hashes = np.unique(np.concatenate(texts))
        runs = np.minimum(np.searchsorted(self._runs, hashes), len(self._runs) - 1)
        runs = runs[self._runs[runs] == hashes]
        self._counts[runs] += 1
        self._first[runs[self._first[runs] < 0]] = record

    def covered(self, share: float, max_records: int) -> dict[int, int]:
        """Finds evaluation records with a text of whose runs the training set contains at least `share`.

        Runs in more than `max_records` training records are ignored as common phrases. Maps an evaluation
        record to a training record that contains its rarest run.
        """
        found: dict[int, int] = {}
        rare = self._counts <= max_records
        for record, runs in zip(self._owners, self._texts, strict=False):  # without texts, one empty array
            counted = runs[rare[runs]]
            shared = counted[self._counts[counted] > 0]
            if len(shared) and len(shared) >= share * len(counted):
                rarest = shared[np.argmin(self._counts[shared])]
                found.setdefault(record, int(self._first[rarest]))
        return found
