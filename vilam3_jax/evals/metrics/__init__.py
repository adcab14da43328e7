"""Metrics of answered questions, one module per kind; importing one registers its metrics."""

MODULES = (
    "calibration", "classification", "detection", "expert_calls", "numbers", "question_kinds", "report_text",
    "text_overlap",
)  # fmt: skip
