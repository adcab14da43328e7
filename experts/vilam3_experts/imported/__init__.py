"""Masks that a tool or people made elsewhere become annotations; see `run.import_masks`."""
