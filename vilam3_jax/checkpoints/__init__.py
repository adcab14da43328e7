"""Orbax checkpoints of runs, and exports of their parameters."""
