"""Plots and HTML from a run."""
