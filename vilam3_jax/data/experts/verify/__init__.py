"""Checks of every expert: of its input before it runs, of its result afterwards.

An expert's checks are on its card, see `cards.Card`; plausible ranges are in `tables/facts.json`.
This package imports neither jax nor flax nor torch.
"""

from vilam3_jax.data.experts.verify.after import Finding, check_result
from vilam3_jax.data.experts.verify.before import check_input, refusal
from vilam3_jax.data.experts.verify.evidence import Evidence

__all__ = ["Evidence", "Finding", "check_input", "check_result", "refusal"]
