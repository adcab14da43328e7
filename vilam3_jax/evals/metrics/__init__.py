"""Metrics of answered questions. Importing the package registers them."""

from vilam3_jax.evals.metrics import classification, detection, numbers, text_overlap

__all__ = ["classification", "detection", "numbers", "text_overlap"]
