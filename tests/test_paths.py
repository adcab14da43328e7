"""Paths that users give: local or in an object store, there or not."""

from __future__ import annotations

import errno
import gzip
import os
import re
import socket

import pytest
from etils import epath

from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths


def test_every_path_has_one_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    names = {
        "a/../b": str(tmp_path / "b"),
        "~/c/": "/home/someone/c",
        "gs://bucket/a/../b/": "gs://bucket/b",
        "gs://bucket": "gs://bucket",
        "gs://bucket/a//b": "gs://bucket/a/b",
        "GS://bucket/a": "gs://bucket/a",
        "file:///data/a%20b": "/data/a b",
        "file://localhost/data": "/data",
        "a:b": str(tmp_path / "a:b"),
    }
    assert {given: os.fspath(paths.as_path(given)) for given in names} == names


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("hdfs://host/x", "hdfs:// is not supported; copy it to a local disk or to gs://"),
        ("foo://x", "foo:// is not supported"),
        ("https://host/x.nii", "download it and give the local file"),
        ("hf://nvidia/x", "hf download"),
        ("gcs://bucket/x", "write gs:// instead"),
        ("gs:/bucket/x", "two slashes"),
        ("C:\\scans\\x.dcm", "a Windows path"),
        ("c:/scans/x.dcm", "a Windows path"),
        ("\\\\server\\scans", "a Windows path"),
    ],
)
def test_paths_of_other_schemes_are_refused_everywhere(path, words) -> None:
    for function in (
        paths.as_path,
        paths.children,
        paths.file_size,
        lambda path: paths.read_bytes(path, 9),
        lambda path: paths.write_bytes_atomic(path, b""),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_object_stores_name_the_package_that_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(paths, "_is_installed", lambda package: False)
    with pytest.raises(
        UserError, match=r"gs://b/x: gs:// needs the package gcsfs; pip install 'vilam3-jax\[gcs\]'"
    ):
        paths.as_path("gs://b/x")
    with pytest.raises(UserError, match="s3:// needs the package s3fs; pip install s3fs"):
        paths.as_path("s3://b/x")
    monkeypatch.setattr(paths, "_is_installed", lambda package: True)
    assert os.fspath(paths.as_path("s3://b/x/../y")) == "s3://b/y"


@pytest.mark.parametrize("root", ["", "gs://bucket"])
def test_reading(tmp_path, bucket, root) -> None:
    root = root or str(tmp_path / "local")
    folder = paths.as_path(root) / "folder"
    assert paths.children(folder) == []
    paths.write_text_atomic(folder / "b", "four")
    paths.write_text_atomic(folder / "a", "")
    paths.write_text_atomic(folder / "b", "more")  # replaced
    assert [path.name for path in paths.children(folder)] == ["a", "b"]
    assert paths.children(folder / "a") == []
    assert paths.read_bytes(folder / "b", 4) == b"more" and paths.file_size(folder / "b") == 4
    with pytest.raises(UserError, match=r"folder/b: 4 bytes, more than the limit of 3"):
        paths.read_bytes(folder / "b", 3)
    with pytest.raises(UserError, match="folder: is a folder"):
        paths.read_bytes(folder, 4)
    for missing in (folder / "c", folder / "a" / "b", folder / "a\0"):
        with pytest.raises(UserError, match="no such file"):
            paths.read_bytes(missing, 4)
    with pytest.raises(UserError, match=r"cannot be read .*too long"):
        paths.read_bytes(folder / ("x" * 300), 4)


def test_a_failing_disk_is_told_from_a_damaged_file(tmp_path) -> None:
    with pytest.raises(UnavailableError, match=r"x\.nii: cannot be read now \(\[Errno 5\] I/O"):
        paths.check_passing(tmp_path / "x.nii", OSError(errno.EIO, "I/O"))
    for text in ("UNAVAILABLE: CURL error", "UNKNOWN: Failed to read: I/O [os_error_code='5' x='y']"):
        with pytest.raises(UnavailableError):  # TensorStore's
            paths.check_passing(tmp_path, ValueError(text))
    paths.check_passing(tmp_path, ValueError("PERMISSION_DENIED: Failed to open [os_error_code='13']"))
    paths.check_passing(tmp_path, ValueError("a text that is UNAVAILABLE: here"))
    paths.check_passing(tmp_path / "x.nii", gzip.BadGzipFile("Not a gzipped file"))
    paths.check_passing(tmp_path / "x.nii", OSError(errno.EACCES, "Permission denied"))


def test_an_object_store_that_does_not_answer(tmp_path, monkeypatch) -> None:
    assert paths.exists(tmp_path) and not paths.exists(tmp_path / "x") and not paths.exists("a\0b")
    no_network = ConnectionError("Cannot connect to host storage.googleapis.com:443")
    no_network.__cause__ = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    for error, kind, words in (
        (no_network, UnavailableError, "gs://b/x: cannot be read now .*start again"),
        (
            RuntimeError("Anonymous caller\nhas no access"),
            UserError,
            r"gs://b/x: cannot be accessed \(RuntimeError",
        ),
    ):

        def fail(path, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(type(epath.Path("gs://b/x")), "exists", fail)
            with pytest.raises(UserError, match=words) as caught:
                paths.exists("gs://b/x")
        assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_a_failing_disk_is_told_from_a_full_one(tmp_path) -> None:
    failing = RuntimeError("a save failed")
    failing.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    for error, kind in ((OSError(errno.ENOSPC, "No space"), UserError), (failing, UnavailableError)):
        assert type(paths.write_error(tmp_path, error)) is kind


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/a: cannot be written"):
        paths.write_text_atomic(tmp_path / "file" / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
