"""Metrics of answered questions, one module per kind; importing one registers its metrics."""

MODULES = ("calibration", "classification", "expert_calls", "report_text")
