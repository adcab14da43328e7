"""Factories of experts that have a card but no network: they say what to do instead."""

from __future__ import annotations

from typing import NoReturn

from vilam3_experts.weights import Weights
from vilam3_jax.errors import UserError


def refuse_organs(weights: Weights) -> NoReturn:
    """Raises a `UserError`: records of ORGANS are imported."""
    del weights
    raise UserError(
        "ORGANS has no network, its masks are imported: `vilam3-experts import --expert ORGANS --masks ... "
        "--data ... --source ... --out STORE`"
    )


def refuse_vista2d(weights: Weights) -> NoReturn:
    """Raises a `UserError`: VISTA2D is only a card, as in the published VILA-M3."""
    del weights
    raise UserError(
        "VISTA2D is only a card, as in the published VILA-M3, and has no network; remove it from the cards, "
        "or add an expert for cell images under another name"
    )
