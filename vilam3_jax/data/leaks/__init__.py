"""Contamination between training and evaluation sets: `vilam3 data leaks`, see docs/leaks.md."""

from vilam3_jax.data.leaks.report import find_leaks, provenance

__all__ = ["find_leaks", "provenance"]
