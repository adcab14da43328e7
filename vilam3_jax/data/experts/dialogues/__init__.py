"""Dialogues about studies, made when they are loaded from what experts said of them.

A stored record holds images; a rule makes question, call, answer and further questions of it, by a die that
seed, record and position decide. The result is an ordinary example: `data/render.py` shows it to the model.

This package imports neither jax nor flax nor torch.
"""
