"""Evaluation protocols, statistics and tables."""
