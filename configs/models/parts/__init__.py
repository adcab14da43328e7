"""Vision towers, projectors and language models of published checkpoints, as config sections.

A size in `configs/models` is put together from these. `configs.models.get` swaps any of them by name.
"""
