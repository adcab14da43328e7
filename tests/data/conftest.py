"""Fixtures of the data tests."""

from __future__ import annotations

import pytest
from pixel_files import dataset, save

from vilam3_jax.data.dicom.pixels import read_image
from vilam3_jax.data.limits import Limits


@pytest.fixture
def shown(tmp_path):
    """Writes an image and renders it."""

    def show(pixels, photometric="MONOCHROME2", *, frame=None, voi=0, limits=None, **tags):
        path = save(tmp_path / "image.dcm", dataset(pixels, photometric, **tags))
        return read_image(path, frame=frame, voi=voi, limits=limits or Limits())

    return show
