"""Metrics of generated radiology reports."""
