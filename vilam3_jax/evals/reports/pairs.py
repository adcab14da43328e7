"""Checks of pairs of references and hypotheses, which all metrics share."""

from __future__ import annotations

from collections.abc import Sequence


def check(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
    """Refuses pairs that no metric can score.

    Raises:
      ValueError: different numbers of items, or an item without references.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} items with references for {len(hypotheses)} hypotheses")
    if without := [index for index, own in enumerate(references) if not own]:
        raise ValueError(f"items without references: {without[:20]}")
