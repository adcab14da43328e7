"""Experts whose masks are imported: there is nothing to run."""

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
        "--data ... --out STORE`"
    )
