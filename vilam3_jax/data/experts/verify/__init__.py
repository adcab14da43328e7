"""Checks of experts: of the input before an expert runs, and of its result afterwards.

An expert's checks are on its card, see `cards.Card`; the plausible ranges are in `tables/facts.json`.
"""

from vilam3_jax.data.experts.verify.after import Finding, check_result
from vilam3_jax.data.experts.verify.before import check_input, refusal
from vilam3_jax.data.experts.verify.evidence import Evidence

__all__ = ["Evidence", "Finding", "check_input", "check_result", "refusal"]
