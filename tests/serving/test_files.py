"""Uploads: zips, limits, expiry, and their deletion."""

from __future__ import annotations

import io
import time
import zipfile

import httpx2 as httpx
import pydicom
import pytest

from tests.serving.test_bad_requests import dicom, refused
from vilam3_jax.errors import UnavailableError
from vilam3_jax.serving import files
from vilam3_jax.serving.errors import ApiError
from vilam3_jax.serving.files import FileStore, Views

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    buffer.seek(0)
    return buffer


def series():
    """A CT of four slices, with names that lead elsewhere."""
    names = ["a/1.dcm", "../../2.dcm", "/etc/3.dcm", "C:\\4.dcm"]
    first = pydicom.dcmread(io.BytesIO(dicom()))
    for place, name in enumerate(names):
        first.ImagePositionPatient = [0, 0, place]
        first.SOPInstanceUID = first.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{place + 1}"
        first.InstanceNumber = place + 1
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, first)
        yield name, buffer.getvalue()


def test_a_zip_of_a_series_is_a_volume(server):
    data = zipped([*series(), ("__MACOSX/._1.dcm", b"x"), ("a/.DS_Store", b"x"), ("a/", b"")]).getvalue()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        stored = client.post("/v1/files", files={"file": ("ct.zip", data)}).json()
        assert stored["vilam3"]["kind"] == "folder of files"
        content = [{"type": "text", "text": "Is it?"}, {"type": "file", "file": {"file_id": stored["id"]}}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        found = client.post("/v1/chat/completions", json=body).json()
        assert found["vilam3"]["description"].startswith("axial slice 2 of 0 to 3")
        refusal = client.post("/v1/chat/completions", json={**body, "vilam3": {"slice": 9}})
        assert "slices 0 to 3" in refused(refusal)


def test_names_of_a_zip_are_not_used():
    with FileStore() as store:
        stored = store.add(zipped([("../../evil", PNG), ("/etc/passwd", PNG)]), "me")
        root = stored.path.parent.parent
        names = sorted(path.name for path in root.rglob("*") if path.is_file())
        assert names == ["00000", "00001"] and oct(root.stat().st_mode)[-3:] == "700"
        alone = store.add(zipped([("x/film.png", PNG)]), "me")
        assert alone.path.is_file() and alone.kind == "PNG image"
    assert not root.exists()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("bomb", bytes(64 << 20))], "unpacks to far more"),
        ([], "holds no files"),
        ([(str(number), b"x") for number in range(5001)], "more than 5000"),
        ([("report.pdf", b"%PDF-1.7")], "PDF"),
    ],
    ids=["bomb", "empty", "many", "pdf"],
)
def test_bad_zips(members, words):
    with FileStore() as store:
        data = zipped(members) if members else zipped([("__MACOSX/x", b"x")])
        with pytest.raises(ApiError, match=words) as caught:
            store.add(data, "me")
        assert caught.value.status == 400 and "/" not in str(caught.value)
        assert len(store) == 0 and not list(store._root.iterdir())


def test_a_zip_that_states_less_than_it_holds():
    data = bytearray(zipped([("big", bytes(1 << 20)), ("other", b"x")]).getvalue())
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(b"PK\x01\x02"))
    data[place + 24 : place + 28] = (10).to_bytes(4, "little")
    with FileStore(max_bytes=1 << 16) as store, pytest.raises(ApiError):
        store.add(io.BytesIO(bytes(data)), "me")


def test_limits_of_size_and_space():
    with FileStore(max_bytes=1000, space=1500) as store:
        with pytest.raises(ApiError, match="larger") as caught:
            store.add(io.BytesIO(PNG + bytes(1000)), "me")
        assert caught.value.status == 413
        first = store.add(io.BytesIO(PNG + bytes(800)), "me")
        with pytest.raises(ApiError, match="full") as caught:
            store.add(io.BytesIO(PNG + bytes(800)), "me")
        assert caught.value.status == 429 and len(list(store._root.iterdir())) == 1
        store.delete(first.id, "me")
        assert store.add(io.BytesIO(PNG + bytes(800)), "me").size == len(PNG) + 800


def test_files_expire_and_belong_to_one_key():
    with FileStore(seconds=0.2) as store:
        stored = store.add(io.BytesIO(PNG), "me")
        assert store.get(stored.id, "me") is stored
        for name, owner in ((stored.id, "you"), ("file-x", "me"), ("", "me")):
            with pytest.raises(ApiError) as caught:
                store.get(name, owner)
            assert caught.value.status == 404
        time.sleep(0.3)
        with pytest.raises(ApiError, match="expired"):
            store.get(stored.id, "me")
        assert stored.path.exists()
        store.sweep()
        assert not stored.path.parent.exists() and len(store) == 0


def test_the_number_of_files_is_limited(monkeypatch):
    monkeypatch.setattr(files, "_MAX_FILES", 2)
    with FileStore() as store:
        first = store.add(io.BytesIO(PNG), "me")
        with pytest.raises(ApiError):
            store.add(io.BytesIO(b"no image"), "me")
        store.add(io.BytesIO(PNG), "me")
        with pytest.raises(ApiError, match="too many files") as caught:
            store.add(io.BytesIO(PNG), "me")
        assert caught.value.status == 429
        store.delete(first.id, "me")
        assert store.add(io.BytesIO(PNG), "me")


def test_a_full_disk_is_told(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with FileStore() as store:
        monkeypatch.setattr("pathlib.Path.mkdir", full)
        for add in (lambda: store.add(io.BytesIO(PNG), "me"), store.for_one_request(PNG).__enter__):
            with pytest.raises(UnavailableError, match="cannot store files now"):
                add()
        assert not store._begun


def test_views_are_bounded_and_die_with_their_file():
    views = Views(max_bytes=10)
    with FileStore() as store:
        store.views = views
        one, other = store.add(io.BytesIO(PNG), "me"), store.add(io.BytesIO(PNG), "me")
        views.keep(one, "a", "view a", 4)
        views.keep(other, "a", "view b", 4)
        assert (views.get(one, "a"), views.get(other, "a"), views.get(one, "b")) == ("view a", "view b", None)
        views.get(one, "a")
        views.keep(one, "b", "view c", 4)
        assert views.get(other, "a") is None and views.get(one, "a") and views.get(one, "b"), (
            "the oldest went"
        )
        views.keep(one, "c", "too large", 11)
        assert views.get(one, "c") is None
        store.delete(one.id, "me")
        views.keep(one, "a", "late", 1)
        assert views.get(one, "a") is None and views._bytes == 0 and not views._found
