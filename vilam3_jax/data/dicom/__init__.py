"""DICOM images: volumes from series and multi-frame files, and single rendered frames."""

from vilam3_jax.data.dicom.grouping import Series
from vilam3_jax.data.dicom.pixels import read_image
from vilam3_jax.data.dicom.series import DAMAGED_HEADER, read_listed, read_series, survey

__all__ = ["DAMAGED_HEADER", "Series", "read_image", "read_listed", "read_series", "survey"]
