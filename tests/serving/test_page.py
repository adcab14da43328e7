"""The page: its files, slices and masks by the server, and the page itself in a browser."""

from __future__ import annotations

import gzip
import io
import re
import shutil

import httpx2 as httpx
import nibabel
import numpy as np
import pytest
from PIL import Image

from tests.serving.conftest import KEY, serve
from tests.serving.test_bad_requests import refused
from tests.serving.test_files import series, zipped
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, failed
from vilam3_jax.data.preprocessing import Preprocessing
from vilam3_jax.data.volumes import AXES, load_volume
from vilam3_jax.errors import UserError
from vilam3_jax.inference import agent
from vilam3_jax.inference.images import open_image
from vilam3_jax.serving import fetch_page
from vilam3_jax.serving.app import PAGE
from vilam3_jax.serving.errors import ApiError
from vilam3_jax.serving.masks import MaskStore
from vilam3_jax.serving.samples import samples_of
from vilam3_jax.serving.viewing import SliceQuery

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def uploaded(http, path):
    with path.open("rb") as file:
        return http.post("/v1/files", files={"file": (path.name, file)}).json()["id"]


@pytest.fixture(scope="module")
def volume(http, world):
    return uploaded(http, world.volume)


@pytest.fixture(scope="module")
def film(http, world):
    return uploaded(http, world.film)


def pixels(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(response.content)))


TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def test_the_files_of_the_page(http):
    assert http.get("/").headers["location"] == "/page/"
    names = [file.name for file in PAGE.iterdir() if file.is_file()]
    assert "index.html" in names
    for name in [*names, ""]:
        found = http.get(f"/page/{name}")
        kind = TYPES[name[name.rindex(".") :]] if name else "text/html"
        assert found.status_code == 200 and found.headers["content-type"].partition(";")[0] == kind
        assert found.headers["x-content-type-options"] == "nosniff"
    policy = http.get("/page/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    refused(http.get("/page/../app.py"), status=404)
    refused(http.get("/page/%2e%2e/app.py"), status=404)


def test_the_page_needs_no_other_server():
    for file in PAGE.glob("*.*"):
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import", text), file
        if file.suffix == ".html":
            assert not re.search(r"<script(?![^>]* src=)|\son\w+=|style=|javascript:", text), (
                "no inline script"
            )
        # Texts of users and models are never parsed.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), file


def test_the_page_is_open_and_its_data_are_not(assistant):
    closed = ("models", "files/x/slice", "files/x/view", "files/x/volume", "masks/x", "masks/x/slice")
    running = serve(assistant, model="tiny", keys=(KEY,))
    with running as running, httpx.Client(base_url=running.url, timeout=60) as stranger:
        assert stranger.get("/page/").status_code == 200
        for path in closed:
            refused(stranger.get(f"/v1/{path}"), "API key", status=401)


def test_a_volume_is_described(http, volume, world):
    found = http.get(f"/v1/files/{volume}/view").json()
    assert found["kind"] == "volume" and found["shape"] == [24, 20, 16] and found["plane"] == "axial"
    assert found["planes"]["coronal"] == {
        "slices": 20, "width": 24, "height": 16, "width_mm": 48.0, "height_mm": 48.0
    }  # fmt: skip
    assert found["modality"] == "unknown" and found["windows"] == {}
    assert found["range"] == list(load_volume(world.volume).limits)
    stated = http.get(f"/v1/files/{volume}/view", params={"modality": "CT"}).json()
    assert stated["windows"]["lung"] == [-600, 1500] and stated["display"] == "window 50, 400"
    assert stated["range"] == [-150, 250]
    assert "/" not in "".join(found["notes"])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("brain", (40, 80)),
        ("lung", (-600, 1500)),
        ("abdomen", (50, 400)),
        ("bone", (400, 1800)),
        ("7,90.5", (7, 90.5)),
    ],
)
def test_slices_are_those_of_the_readers(http, volume, world, axis, name, window):
    query = {"axis": axis, "index": 3, "window": name}
    found = pixels(http.get(f"/v1/files/{volume}/slice", params=query))
    expected = Preprocessing().slice_image(load_volume(world.volume), AXES[axis], 3, window)
    assert np.array_equal(found, expected)
    by_model = open_image(world.volume, None, axis=axis, index=3, window=window)
    assert np.array_equal(found, by_model.image)


@pytest.mark.parametrize("modality", [None, "CT", "MR"])
def test_the_default_slice_is_that_of_the_model(http, volume, world, modality):
    query = {} if modality is None else {"modality": modality}
    found = pixels(http.get(f"/v1/files/{volume}/slice", params=query))
    assert np.array_equal(found, open_image(world.volume, None, modality=modality).image)


def test_the_window_from_the_smallest_to_the_largest_value(http, volume, world):
    found = pixels(http.get(f"/v1/files/{volume}/slice", params={"index": 5, "window": "minmax"}))
    voxels = load_volume(world.volume).voxels
    share = (voxels[:, :, 5].T[::-1, ::-1] - float(voxels.min())) / (
        float(voxels.max()) - float(voxels.min())
    )
    assert np.abs(found[..., 0] - share * 255).max() < 1.001


def test_a_film_is_shown_as_it_is(http, film, world):
    assert http.get(f"/v1/files/{film}/view").json()["kind"] == "image"
    found = pixels(http.get(f"/v1/files/{film}/slice"))
    assert np.array_equal(found, np.asarray(Image.open(world.film)))
    for query in ({"index": 0}, {"axis": "axial"}, {"window": "lung"}):
        refused(http.get(f"/v1/files/{film}/slice", params=query), "2-D image")
    refused(http.get(f"/v1/files/{film}/volume"), "2-D image")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"axis": "oblique"}, "axial, coronal, sagittal"),
        ({"axis": "2"}, "axis"),
        ({"index": "16"}, "slices 0 to 15"),
        ({"axis": "sagittal", "index": "24"}, "slices 0 to 23"),
        ({"index": "-1"}, "from 0"),
        ({"index": "1e3"}, "from 0"),
        ({"index": "٣"}, "from 0"),
        ({"index": "9" * 40}, "from 0"),
        ({"window": "liver"}, "brain"),
        ({"window": "40,0"}, "width above 0"),
        ({"window": "40,-5"}, "width above 0"),
        ({"window": "nan,inf"}, "CENTRE,WIDTH"),
        ({"window": "1,2,3"}, "CENTRE,WIDTH"),
        ({"window": "brain", "modality": "MR"}, "is for CT"),
        ({"modality": "XX"}, "XX"),
        ({"modality": "../etc"}, "DICOM code"),
        ({"size": "4"}, "unknown parameter"),
    ],
    ids=str,
)
def test_slices_that_are_refused(http, volume, query, words):
    refused(http.get(f"/v1/files/{volume}/slice", params=query), words)


def test_files_of_others_and_damaged_ones(http, world, tmp_path):
    for path in ("slice", "view", "volume"):
        refused(http.get(f"/v1/files/file-x/{path}"), status=404)
    damaged = tmp_path / "scan.nii.gz"
    damaged.write_bytes(gzip.compress(gzip.decompress(world.volume.read_bytes())[:2000]))
    name = uploaded(http, damaged)
    refused(http.get(f"/v1/files/{name}/view"))
    refused(http.get(f"/v1/files/{name}/slice"))


def test_a_zip_of_a_series_is_shown(http):
    data = zipped(series()).getvalue()
    name = http.post("/v1/files", files={"file": ("ct.zip", data)}).json()["id"]
    found = http.get(f"/v1/files/{name}/view").json()
    assert found["kind"] == "volume" and found["modality"] == "CT" and found["shape"][2] == 4
    assert set(found["windows"]) == {"brain", "lung", "abdomen", "bone", "minmax"}
    height, width = found["shape"][1], found["shape"][0]
    assert pixels(http.get(f"/v1/files/{name}/slice", params={"index": 3})).shape == (height, width, 3)
    refused(http.get(f"/v1/files/{name}/view", params={"modality": "MR"}), "declared as MR")
    first = next(series())[1]
    name = http.post("/v1/files", files={"file": ("one.dcm", first)}).json()["id"]
    assert http.get(f"/v1/files/{name}/view").json()["kind"] in ("volume", "image")
    assert pixels(http.get(f"/v1/files/{name}/slice")).ndim == 3


def test_a_volume_for_the_browser(http, volume, world):
    found = nibabel.Nifti1Image.from_bytes(http.get(f"/v1/files/{volume}/volume").content)
    expected = load_volume(world.volume)
    assert np.array_equal(np.asarray(found.dataobj), expected.voxels)
    np.testing.assert_allclose(found.affine, expected.affine)


def test_memory_of_shown_volumes(server, world):
    service = server.service
    viewer = service.viewer
    with world.volume.open("rb") as file:
        first = service.store.add(file, "me")
    viewer.describe(first)
    assert first.shown is not None
    size, viewer._max_bytes = viewer._max_bytes, first.shown.voxels.nbytes
    try:
        with world.volume.open("rb") as file:
            second = service.store.add(file, "me")
        viewer.png(second, SliceQuery())
        assert first.shown is None and second.shown is not None
        service.store.delete(second.id, "me")
        assert second.shown is None
    finally:
        viewer._max_bytes = size
        service.store.delete(first.id, "me")


@pytest.fixture
def calls_organs(monkeypatch):
    """The first turn of every dialogue about a volume becomes a call."""
    plain = agent._Dialogue.add_answer

    def add_answer(row, tokenizer, decoded):
        plain(row, tokenizer, decoded)
        if not row.results and not row.earlier and len(row.turns) <= 2:
            row.turns[-1] = agent.Message("assistant", "Let me see. <ORGANS(organs)>.")

    monkeypatch.setattr(agent._Dialogue, "add_answer", add_answer)


def test_masks_of_an_answer(http, volume, world, calls_organs):
    part = {"type": "image_url", "image_url": {"url": volume}, "vilam3": {"slice": 5}}
    message = {"role": "user", "content": [{"type": "text", "text": "Is the liver visible?"}, part]}
    body = {"messages": [message], "max_tokens": 4, "vilam3": {"masks": True, "transcript": True}}
    found = http.post(CHAT, json=body).json()
    (call,) = found["choices"][0]["message"]["experts"]
    mask = call["result"]["mask"]
    (label,) = mask["labels"]
    assert label == {
        "id": 1, "name": "liver", "colour": "#ff0000", "volume_ml": 7.7, "components": 1, "voxels": 640
    }  # fmt: skip
    assert mask["shape"] == [24, 20, 16] and mask["largest"] == {"sagittal": 4, "coronal": 4, "axial": 2}
    query = {"axis": "coronal", "index": 6}
    shown = pixels(http.get(f"/v1/masks/{mask['id']}/slice", params=query))
    expected = np.zeros((24, 16), bool)
    expected[4:12, 2:12] = True
    assert shown.shape == (16, 24, 4)
    assert np.array_equal(shown[..., 3] == 255, expected.T[::-1, ::-1])
    assert (shown[shown[..., 3] > 0] == [255, 0, 0, 255]).all() and not shown[shown[..., 3] == 0].any()
    response = http.get(f"/v1/masks/{mask['id']}")
    assert "organs.nii.gz" in response.headers["content-disposition"]
    stored = nibabel.Nifti1Image.from_bytes(gzip.decompress(response.content))
    assert np.count_nonzero(np.asarray(stored.dataobj) == 1) == 640
    np.testing.assert_allclose(stored.affine, load_volume(world.volume).affine)
    refused(http.get(f"/v1/masks/{mask['id']}/slice", params={"index": 16}), "slices 0 to 15")
    refused(http.get(f"/v1/masks/{mask['id']}/slice", params={"window": "lung"}), "unknown parameter")
    refused(http.get("/v1/masks/mask-x/slice"), "no such mask", status=404)
    roles = [turn["role"] for turn in found["vilam3"]["transcript"]]
    assert roles == ["cards", "user", "assistant", "expert", "assistant"]
    texts = [turn["text"] for turn in found["vilam3"]["transcript"]]
    assert texts[2] == "Let me see. <ORGANS(organs)>." and "liver" in texts[3]
    assert "<ORGANS" in texts[0] and "ORGANS" not in texts[1]
    assert not any("/tmp" in text or str(world.annotations) in text for text in texts)
    plain = http.post(CHAT, json={**body, "vilam3": {}}).json()
    assert "mask" not in plain["choices"][0]["message"]["experts"][0]["result"]
    assert "transcript" not in plain["vilam3"]


def annotation(shape=(3, 3, 3)):
    labels = np.ones(shape, np.uint8)
    segment = Segment(1, "liver", labels.size, 1.0, 1, (0, 0, 0, *shape))
    return Annotation("key", "ORGANS", segments=(segment,), labels=LabelMap.encode(labels, np.eye(4)))


def test_masks_are_forgotten():
    masks = MaskStore(seconds=-1)
    assert masks.add(failed("key", "ORGANS", "", "no"), "me") is None
    assert masks.add(Annotation("key", "PNEUMONIA", probabilities={"pneumonia": 0.1}), "me") is None
    name = masks.add(annotation(), "me")["id"]
    with pytest.raises(ApiError, match="expired"):
        masks.get(name, "me")
    masks.sweep()
    assert len(masks) == 0
    masks = MaskStore(max_bytes=3000)
    names = [masks.add(annotation(), "me")["id"] for _ in range(4)]
    assert len(masks) == 2 and masks.get(names[-1], "me").annotation.expert == "ORGANS"
    for name, owner in ((names[0], "me"), (names[-1], "you")):
        with pytest.raises(ApiError):
            masks.get(name, owner)


def test_the_model_tells_what_the_page_needs(http, assistant):
    (model,) = http.get("/v1/models").json()["data"]
    extra = model["vilam3"]
    assert [card["name"] for card in extra["cards"]] == extra["experts"] == [c.name for c in assistant.cards]
    assert all(extra["questions"][kind] for kind in ("CT", "MR", "CR", "other", ""))
    assert extra["niivue"] == (PAGE / "vendor/niivue.js").is_file()


def test_samples_are_stored_like_uploads(assistant, world, tmp_path):
    folder = tmp_path / "samples"
    with pytest.raises(UserError, match="no such folder"):
        samples_of(str(folder))
    folder.mkdir()
    (folder / ".hidden").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no files"):
        samples_of(str(folder))
    for path in (world.volume, world.film):
        shutil.copy(path, folder)
    (folder / "notes.txt").write_text("hello")
    samples = samples_of(str(folder))
    running = serve(assistant, model="tiny", samples=samples)
    with running as running, httpx.Client(base_url=running.url, timeout=60) as client:
        (model,) = client.get("/v1/models").json()["data"]
        named = {one["name"]: one["id"] for one in model["vilam3"]["samples"]}
        assert set(named) == {"film", "notes", "scan"}
        for name, path in (("film", world.film), ("scan", world.volume)):
            stored = client.post(f"/v1/samples/{named[name]}").json()
            assert stored["bytes"] == path.stat().st_size and stored["filename"] == "scan"
            assert client.get(f"/v1/files/{stored['id']}/view").status_code == 200
            assert client.delete(f"/v1/files/{stored['id']}").json()["deleted"]
            assert path.exists() and (folder / path.name).exists()
        refused(client.post(f"/v1/samples/{named['notes']}"), "text file")
        for name in ("sample-3", "sample-", "sample-٣", "sample-9999999", "..%2ffilm.png"):
            refused(client.post(f"/v1/samples/{name}"), status=404)
        (folder / world.film.name).unlink()
        refused(client.post(f"/v1/samples/{named['film']}"), "cannot be read", status=503)


def test_sequences_of_one_head_are_on_one_grid(http, world, tmp_path):
    other = tmp_path / "other.nii.gz"
    volume = nibabel.load(world.volume)
    nibabel.save(nibabel.Nifti1Image(np.asarray(volume.dataobj)[:, :, :8], volume.affine), other)
    first, second = uploaded(http, world.volume), uploaded(http, world.volume)
    third = uploaded(http, other)

    def asked(*images):
        parts = [
            {"type": "image_url", "image_url": {"url": name}, "vilam3": {"role": role, "modality": "MR"}}
            for role, name in images
        ]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": "Is there a tumor?"}]}
        return http.post(CHAT, json={"messages": [message], "max_tokens": 1})

    found = asked(("t1c", first), ("flair", second))
    assert found.status_code == 200, found.text
    assert found.json()["vilam3"]["description"].startswith("t1c: axial slice 8 of 0 to 15")
    refused(asked(("t1c", first), ("flair", third)), "scans of one grid")
    refused(asked(("t1c", first), ("t1c", second)), "same role")


def test_another_archive_than_the_pinned_one_is_refused(tmp_path):
    archive = tmp_path / "niivue.tgz"
    archive.write_bytes(b"something else")
    with pytest.raises(UserError, match="sha256"):
        fetch_page.main([f"--archive={archive}"])
    with pytest.raises(UserError, match="no such file"):
        fetch_page.main(["--archive=/nowhere"])
