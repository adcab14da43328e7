"""Metrics of answered questions."""
