"""Dialogues about studies, generated at load time from the experts' annotations.

A stored record holds images. A rule makes a question, a call, an answer and follow-up questions of it, with a
random generator that is seeded by run, record and position. The result is an ordinary example, which
`data/render.py` renders.

This package imports neither jax nor flax nor torch.
"""
