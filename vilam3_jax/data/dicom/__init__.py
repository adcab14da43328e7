"""DICOM: volumes out of series and multi-frame files, and pictures."""

from vilam3_jax.data.dicom.pixels import read_film
from vilam3_jax.data.dicom.series import read_series

__all__ = ["read_film", "read_series"]
