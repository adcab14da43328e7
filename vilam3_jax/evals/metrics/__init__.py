"""Metrics of answered questions. Importing the package registers them."""

from vilam3_jax.evals.metrics import (
    calibration,
    classification,
    detection,
    expert_calls,
    numbers,
    report_text,
    text_overlap,
)

__all__ = [
    "calibration",
    "classification",
    "detection",
    "expert_calls",
    "numbers",
    "report_text",
    "text_overlap",
]
