"""Removes patient identifiers from DICOM images: `vilam3 data deidentify`, see docs/deidentify.md."""

from vilam3_jax.data.deidentify.run import deidentify

__all__ = ["deidentify"]
