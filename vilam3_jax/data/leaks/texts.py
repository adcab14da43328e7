"""Runs of words that two sets of texts share.

A text of at least 13 words is known by all runs of 13 words in it, the length in use since GPT-3 (Brown et
al., Language Models are Few-Shot Learners, appendix C); a shorter one by all its words.
"""

from __future__ import annotations

import functools
import hashlib
import re

import numpy as np

RUN = 13
_FEWEST_WORDS = 4
_FACTOR = 0x9E3779B97F4A7C15  # odd: multiplying by it loses no bit
_POWERS = np.array([pow(_FACTOR, power, 1 << 64) for power in range(RUN)], np.uint64)
_WORD = re.compile(r"\w+")


def run_hashes(text: str) -> np.ndarray:
    """Hashes of the runs of words in a text, without regard to case and punctuation.

    Returns:
      uint64 [R], sorted and unique; empty for a text of fewer than 4 words.
    """
    words = _WORD.findall(text.casefold())
    if len(words) < _FEWEST_WORDS:
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
    """The texts of an evaluation set, against which the records of a training set are counted.

    Memory grows with the evaluation set alone.
    """

    def __init__(self, texts: list[tuple[int, np.ndarray]]) -> None:
        """Takes (record, `run_hashes`) of every text."""
        self._owners = np.array([record for record, _ in texts], np.int64)
        lengths = [len(hashes) for _, hashes in texts]
        joined = np.concatenate([hashes for _, hashes in texts]) if texts else np.zeros(0, np.uint64)
        self._runs, self._places = np.unique(joined, return_inverse=True)
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.forget()

    def forget(self) -> None:
        """Starts anew with another training set."""
        self._counts = np.zeros(len(self._runs), np.int32)
        self._first = np.full(len(self._runs), -1, np.int64)

    def count(self, record: int, texts: tuple[np.ndarray, ...]) -> None:
        """Counts the runs of a training record, each once."""
        if not texts or not len(self._runs):
            return
        hashes = np.unique(np.concatenate(texts))
        places = np.minimum(np.searchsorted(self._runs, hashes), len(self._runs) - 1)
        places = places[self._runs[places] == hashes]
        self._counts[places] += 1
        self._first[places[self._first[places] < 0]] = record

    def covered(self, share: float, most: int) -> dict[int, int]:
        """Evaluation records with a text that the training set has too.

        Args:
          share: of the runs of a text that must be in the training set.
          most: runs in more training records than this are phrases of the genre and do not count.

        Returns:
          Evaluation record → a training record that shares its rarest run.
        """
        found: dict[int, int] = {}
        rare = self._counts <= most
        for text in range(len(self._starts) - 1):
            places = self._places[self._starts[text] : self._starts[text + 1]]
            counted = places[rare[places]]
            shared = counted[self._counts[counted] > 0]
            if len(shared) and len(shared) >= share * len(counted):
                rarest = shared[np.argmin(self._counts[shared])]
                found.setdefault(int(self._owners[text]), int(self._first[rarest]))
        return found
