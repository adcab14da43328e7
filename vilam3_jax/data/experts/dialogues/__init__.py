"""Dialogues about studies, generated at load time from the experts' annotations.

A stored record holds only images. A rule turns it into a question, an expert call, an answer and follow-up
questions, with a random generator seeded by run, record and position. The result is an ordinary example,
which `data/render.py` renders.
"""
