"""Experts as data: cards, calls, what experts said, and how a model is told of it."""
