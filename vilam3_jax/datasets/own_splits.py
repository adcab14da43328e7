"""Splits of one's own data: as a record states them, or by hashes of what may not be divided."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from vilam3_jax.errors import UserError

TRAIN, HELDOUT = "train", "heldout"
STATED = "train, validation, test or heldout"
_SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("heldout", "held-out", "held_out"), HELDOUT),
}


def split_named(value: object) -> str | None:
    """The split that a record states in one of the usual words, or None.

    >>> split_named(" Val "), split_named("fold 3")
    ('validation', None)
    """
    return _SPLITS.get(value.strip().lower()) if isinstance(value, str) else None


def groups_of(count: int, nodes: np.ndarray, lone: np.ndarray) -> np.ndarray:
    """What may not be divided: records that share anything, directly or through others.

    Args:
      count: number of records.
      nodes: (record, digest) pairs of what they share, such as patients and images. [m, 2] uint64.
      lone: what names a record that shares nothing. [count] uint64.

    Returns:
      [count] uint64: the smallest digest of all that is tied together.
    """
    names, place = np.unique(nodes[:, 1], return_inverse=True)
    owner = nodes[:, 0].astype(np.int64)
    ties = sparse.coo_array(
        (np.ones(len(owner), np.uint8), (owner, count + place)), shape=(count + len(names),) * 2
    )
    parts, part = csgraph.connected_components(ties, directed=False)
    least = np.full(parts, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, part[count:], names)
    alone = np.flatnonzero(np.bincount(owner, minlength=count) == 0)
    least[part[alone]] = lone[alone]
    return least[part[:count]]


def held_out(
    groups: np.ndarray, share: float, path: str, usable: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Split → [n] bool: groups whose hash lies below the share, at least one if any share is asked for.

    Args:
      groups: of `groups_of`.
      share: about this share of the groups is held out.
      path: of the file, for the message.
      usable: [n] bool: the others are known to be skipped, so they stay in the first split; None: all.

    Raises:
      UserError: all records are of one group.
    """
    usable = np.ones(len(groups), bool) if usable is None else usable
    mixed = _mixed(groups)
    held = usable & (mixed < np.uint64(share * 2**64))
    if share and usable.any() and not held.any():
        held = usable & (mixed == mixed[usable].min())
    if share and usable.any() and held[usable].all():
        raise UserError(
            f"{path}: all records share images or a patient, so none can be held out; give --heldout 0, or "
            "--split where the records state their split"
        )
    return {TRAIN: ~held, HELDOUT: held}


def _mixed(values: np.ndarray) -> np.ndarray:
    """Even hashes of [n] uint64 (SplitMix64's finaliser): the smallest of several digests is not even."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
