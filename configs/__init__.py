"""Recipes: one short file per run; `models/` holds the sizes, `quickstart/` the runs of `make quickstart`."""
