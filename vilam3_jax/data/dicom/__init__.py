"""DICOM: volumes out of series and multi-frame files, and pictures."""

from vilam3_jax.data.dicom.grouping import Series
from vilam3_jax.data.dicom.pixels import DicomPicture, read_film, read_picture
from vilam3_jax.data.dicom.series import DAMAGED_HEADER, list_series, read_listed, read_series, survey

__all__ = [
    "DAMAGED_HEADER",
    "DicomPicture",
    "Series",
    "list_series",
    "read_film",
    "read_listed",
    "read_picture",
    "read_series",
    "survey",
]
