"""Experts with a card and no network: their factories say what to do instead."""

from __future__ import annotations

from typing import NoReturn

from vilam3_experts.weights import Weights
from vilam3_jax.errors import UserError


def refuse_organs(weights: Weights) -> NoReturn:
    """Says how records of ORGANS are made.

    Raises:
      UserError: always.
    """
    del weights
    raise UserError(
        "ORGANS has no network, its masks are imported: `vilam3-experts import --expert ORGANS --masks ... "
        "--data ... --source ... --out STORE`"
    )


def refuse_vista2d(weights: Weights) -> NoReturn:
    """Says that VISTA2D is a card only, as in the published VILA-M3.

    Raises:
      UserError: always.
    """
    del weights
    raise UserError(
        "VISTA2D has a card only, as in the published VILA-M3, where nothing stands behind it; leave it out "
        "of the cards, or offer an expert for cell images under a name of its own"
    )
