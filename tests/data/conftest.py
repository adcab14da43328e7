"""An object store for tests, below a local folder."""

from __future__ import annotations

import pytest
from etils.epath import testing


@pytest.fixture
def bucket(tmp_path):
    """`gs://bucket` lies below a local folder."""

    def local(path):
        return str(path).replace("gs://", str(tmp_path) + "/")

    def one(function, path, *args, **kwargs):
        return function(local(path), *args, **kwargs)

    def two(function, path, target, *args, **kwargs):
        return function(local(path), local(target), *args, **kwargs)

    names = ("exists", "glob", "isdir", "listdir", "makedirs", "mkdir", "open", "remove", "stat")
    with testing.mock_epath(**dict.fromkeys(names, one), **dict.fromkeys(("copy", "rename", "replace"), two)):
        yield tmp_path / "bucket"
