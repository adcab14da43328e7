"""Leaks and contamination between training and evaluation sets: `vilam3 data leaks`, see docs/leaks.md."""

from vilam3_jax.data.leaks.report import carried, ledger

__all__ = ["carried", "ledger"]
