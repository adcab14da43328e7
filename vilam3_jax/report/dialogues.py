"""Selects the evaluation rows that the report shows as sample dialogues."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from vilam3_jax.report import runs

Row = Mapping[str, Any]

# Arm and number of dialogues shown from it.
COUNTS = (("stage4_experts", 7), ("stage4_falsified", 3), ("stage4_no_experts", 1), ("stage3", 1))


def choose(arms: Sequence[runs.Arm], counts: Sequence[tuple[str, int]] = COUNTS) -> list[Row]:
    """Picks rows for variety, independently of how good they look.

    Greedily takes the row whose modality, question type, outcome, volume and expert call were shown least so
    far; ties go by the hash of the item. Falsified rows prefer items also shown with the true expert.

    Returns:
      Rows in the order of `counts`; fewer where an arm has fewer.
    """
    by_name = {arm.name: arm.rows for arm in arms}
    shown: collections.Counter[tuple[str, ...]] = collections.Counter()
    chosen: list[Row] = []
    for arm, count in counts:
        left = list(by_name.get(arm, []))
        earlier = {row["item"] for row in chosen}
        for _ in range(min(count, len(left))):
            best = min(left, key=lambda row: (_cost(row, arm, shown, earlier), _hash(row["item"])))
            left.remove(best)
            shown.update(_features(best, arm))
            chosen.append(best)
    return chosen


def _features(row: Row, arm: str) -> list[tuple[str, ...]]:
    return [
        ("modality", arm, str(row.get("modality"))),
        ("modality", str(row.get("modality"))),
        ("type", str(row["question_type"])),
        ("type", arm, str(row["question_type"])),
        ("outcome", arm, str(bool(row["correct"]))),
        ("called", arm, str(row.get("expert_called") or "")),
        ("volume", str(row["cluster"])),
    ]


def _cost(row: Row, arm: str, shown: Mapping[tuple[str, ...], int], earlier: set[str]) -> int:
    # The expert arms are there to show expert calls; a row without one illustrates nothing.
    silent = arm in ("stage4_experts", "stage4_falsified") and not row.get("trigger")
    unpaired = arm != "stage4_falsified" or row["item"] not in earlier
    return sum(shown[feature] for feature in _features(row, arm)) + 2 * unpaired + 4 * silent


def _hash(item: object) -> str:
    return hashlib.sha256(str(item).encode()).hexdigest()
