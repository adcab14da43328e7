"""Bad input: every refusal is one clear sentence with a status below 500."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib

import httpx2 as httpx
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
TEXT = {"messages": [{"role": "user", "content": "Is it?"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def refused(response, *words, status=400):
    """Checks an error; returns its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message and "\n" not in message and len(message) < 400 and "Traceback" not in message
    assert "/tmp" not in message and "vilam3-files" not in message
    for word in words:
        assert word in message, message
    return message


def changed(**values):
    return {**TEXT, **values}


def part(**values):
    return changed(messages=[{"role": "user", "content": [{"type": "text", "text": "Is it?"}, values]}])


def url(data, kind="image/png"):
    return part(type="image_url", image_url={"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"})


def message(**values):
    return changed(messages=[{"role": "user", "content": "Is it?", **values}])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["messages"]),
        (changed(messages=[]), ["messages", "one or more"]),
        (changed(messages="hi"), ["messages", "list"]),
        (changed(messages=[1]), ["messages[0]", "object"]),
        (changed(messages=[{}]), ["messages[0].role"]),
        (message(role="pope"), ["messages[0].role", "user"]),
        (message(role="tool"), ["experts are called by the server"]),
        (message(role="assistant"), ["last message"]),
        (message(content=""), ["empty"]),
        (message(content="  \n"), ["empty"]),
        (message(content=None), ["content"]),
        (message(content=5), ["content"]),
        (message(content=[]), ["content"]),
        (message(content=[{"type": "text"}]), ["content[0].text"]),
        (message(content=[{"type": "video"}]), ["content[0].type"]),
        (message(content="x" * 1_000_000), ["1000000 characters"]),
        (message(content="x " * 8000), ["max_length"]),
        (message(content="What is <image>?"), ["<image>"]),
        (message(content="\ud800"), ["Unicode"]),
        (changed(messages=[{"role": "user", "content": "x"}] * 300), ["300 entries"]),
        (changed(messages=[{"role": "assistant", "content": "x"}, *TEXT["messages"]]), ["first message"]),
        (message(colour="red"), ["messages[0].colour", "unknown field"]),
        (changed(model="gpt-5"), ["this server has tiny"]),
        (changed(model=7), ["model", "string"]),
        (changed(max_tokens=0), ["max_tokens", "1"]),
        (changed(max_tokens="7"), ["max_tokens"]),
        (changed(max_tokens=1.5), ["max_tokens"]),
        (changed(max_tokens=True), ["max_tokens"]),
        (changed(max_tokens=10**400), ["max_tokens"]),
        (changed(temperature=-1), ["temperature"]),
        (changed(temperature="hot"), ["temperature"]),
        (changed(temperature=10**400), ["temperature"]),
        (changed(top_p=2), ["top_p"]),
        (changed(seed=2**70), ["seed"]),
        (changed(stop=[""]), ["stop"]),
        (changed(stop=["a"] * 5), ["stop"]),
        (changed(stop={"a": 1}), ["stop"]),
        (changed(stop=0), ["stop"]),
        (changed(stream="yes"), ["stream"]),
        (changed(stream_options={}), ["stream_options"]),
        (changed(logprobs=1), ["logprobs"]),
        (changed(top_logprobs=5), ["top_logprobs"]),
        (changed(n=2), ["n: one answer"]),
        (changed(n=True), ["n: one answer"]),
        (changed(n={}), ["n: one answer"]),
        (changed(tools=[{"type": "function"}]), ["tools"]),
        (changed(temprature=1), ["did you mean temperature"]),
        (changed(response_format="json"), ["response_format"]),
        (changed(response_format={"type": "xml"}), ["response_format.type"]),
        (changed(response_format={"type": "json_schema"}), ["json_schema"]),
        (changed(response_format={"type": "json_schema", "json_schema": {"name": "x"}}), ["schema"]),
        (changed(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}),
         ["schema"]),
        (changed(vilam3=3), ["vilam3"]),
        (changed(vilam3={"experts": "on"}), ["vilam3.experts"]),
        (changed(vilam3={"axis": "diagonal"}), ["vilam3.axis", "axial"]),
        (changed(vilam3={"window": [1]}), ["vilam3.window"]),
        (changed(vilam3={"window": [1, -1]}), ["vilam3.window"]),
        (changed(vilam3={"slice": -1}), ["vilam3.slice"]),
        (changed(vilam3={"wndow": [1, 2]}), ["did you mean window"]),
        (changed(vilam3={"previous": 5}), ["vilam3.previous"]),
        (changed(vilam3={"previous": "chatcmpl-" + "0" * 32}), ["store: true"]),
        ({**changed(messages=[*TEXT["messages"], {"role": "assistant", "content": "x"}, *TEXT["messages"]]),
          "vilam3": {"previous": "chatcmpl-x"}}, ["only the question that follows"]),
        (changed(store="yes"), ["store"]),
        (part(type="image_url", image_url="x"), ["image_url"]),
        (part(type="image_url", image_url={"url": "https://example.org/a.png"}), ["fetches no URLs"]),
        (part(type="image_url", image_url={"url": "file:///etc/passwd"}), ["fetches no URLs"]),
        (part(type="image_url", image_url={"url": "/etc/passwd"}), ["data URL"]),
        (part(type="image_url", image_url={"url": "data:image/png;base64,****"}), ["base64"]),
        (part(type="image_url", image_url={"url": "data:image/png;base64,"}), ["empty"]),
        (part(type="image_url", image_url={"url": "data:" + "a" * 100_000}), ["data URL"]),
        (part(type="image_url", image_url={"url": "file-" + "a" * 32}), ["upload it again"]),
        (part(type="image_url", image_url={"url": "file-../../etc/passwd"}), ["upload it again"]),
        (url(b"hello"), ["text file"]),
        (url(b"%PDF-1.7"), ["PDF"]),
        (url(b"\x89PNG\r\n\x1a\n" + bytes(50)), ["0 x 0 pixels"]),
    ],
)  # fmt: skip
def test_bodies(http, body, words):
    unknown = ("this server has tiny", "upload it again", "store: true")
    status = 404 if any(one in words for one in unknown) else 400
    refused(http.post(CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"}), *words,
            status=status)  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"messages": NaN}', b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}', b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"seed": ' + b"9" * 10_000 + b"}", b'{"a": 1} trailing', b"\x00",
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_what_is_no_json_object(http, path, body):
    refused(http.post(path, content=body, headers={"Content-Type": "application/json"}))


def test_other_requests(http):
    refused(http.post(CHAT, content=json.dumps(TEXT)), "Content-Type", status=415)
    refused(http.get("/v1/nothing"), status=404)
    refused(http.get(CHAT), "POST", status=405)
    refused(http.post("/v1/files"), "file")
    refused(http.post("/v1/files", data={"file": "text"}), "file")
    multipart = {"Content-Type": "multipart/form-data"}
    refused(http.post("/v1/files", content=b"x", headers=multipart), "boundary")
    refused(http.post("/v1/files", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=a"}))
    refused(http.get("/v1/files/file-" + "a" * 32), status=404)
    refused(http.delete("/v1/files/..%2f..%2fetc"), status=404)
    refused(http.post(CHAT, params={"Prompt": "", "stream": "maybe"}), "stream")
    refused(http.post("/v1/chat/completions/?Prompt=%ff"))


def png_of(width, height):
    """A PNG that states a size, with few pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def dicom(**fields):
    """A CT slice."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = generate_uid(), generate_uid()
    dataset.Modality, dataset.Rows, dataset.Columns = "CT", 32, 24
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 1, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelSpacing, dataset.SliceThickness = [1, 1], 1
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.PixelData = np.arange(32 * 24, dtype=np.int16).tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=False)
    return buffer.getvalue()


BIG_NIFTI = gzip.compress(b"\x5c\x01\0\0" + bytes(340) + b"n+1\0" + bytes(64 << 20))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png_of(100_000, 100_000), ["pixels"]),
        (png_of(20_000, 20_000), ["pixels"]),
        (png_of(300, 300)[:900], ["cut short"]),
        (BIG_NIFTI, ["the file"]),
        (b"PK\x03\x04" + bytes(100), ["zip is damaged"]),
        (gzip.compress(b"hello"), []),
        (dicom()[:700], ["the file"]),
        (dicom(Rows=60_000, Columns=60_000), ["the file"]),
        (b"", ["empty file"]),
        (b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\ndata file: ../../../etc/passwd\n\n", []),
    ],
    ids=[
        "bomb",
        "20,000 pixels",
        "cut png",
        "gzip bomb",
        "zip",
        "gzip",
        "cut dicom",
        "large dicom",
        "empty",
        "nrrd",
    ],
)
def test_bad_files(http, server, data, words):
    before = on_disk(server)
    stored = http.post("/v1/files", files={"file": ("a", data)})
    if stored.status_code == 200:
        body = part(type="image_url", image_url={"url": stored.json()["id"]})
        refused(http.post(CHAT, json=body), *words)
        assert http.delete(f"/v1/files/{stored.json()['id']}").status_code == 200
    else:
        refused(stored, *words)
    if data and not data.startswith(b"PK"):
        refused(http.post(CHAT, json=url(data)))
    assert on_disk(server) == before


def on_disk(server):
    """All files of the server's uploads."""
    return sorted(server.service.store._root.rglob("*"))


@pytest.mark.parametrize("kind", ["application/dicom", "image/png"])
def test_dicom_as_a_data_url(http, server, kind):
    before = on_disk(server)
    refused(http.post(CHAT, json=url(dicom(), kind)), "upload the file to /v1/files")
    assert on_disk(server) == before


def test_hostile_texts_in_dicom_reach_nobody(http, caplog):
    name = "../../etc/passwd\\<script>alert(1)</script>"
    data = dicom(PatientName=name, PatientID="$(reboot)", SeriesDescription=name, StudyDescription=name)
    found = about_upload(http, data)
    assert found.status_code == 200, found.text
    assert "alert" not in found.text and "reboot" not in found.text + caplog.text
    bad = dicom(PatientName=name, PatientID="$(reboot)", ImageOrientationPatient=[0, 0, 0, 0, 0, 0])
    said = refused(about_upload(http, bad))
    assert "alert" not in said and "reboot" not in said


def about_upload(http, data):
    """The answer about a file whose name is hostile, too."""
    name = "../../../etc/passwd\n<script>.dcm"
    stored = http.post("/v1/files", files={"file": (name, data)}).json()
    assert stored["filename"] == "scan"
    return http.post(CHAT, json=part(type="image_url", image_url={"url": stored["id"]}))


def test_a_wide_image_is_read(http):
    buffer = io.BytesIO()
    Image.new("L", (20_000, 30)).save(buffer, "PNG")
    assert http.post(CHAT, json=url(buffer.getvalue())).status_code == 200


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4).map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = [
    *("messages", "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "logprobs", "n"),
    *("store", "previous_response_id"),
    *("vilam3", "response_format", "input", "instructions", "text", "include", "max_output_tokens", "tools"),
]
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url", "file", "input_text", "input_image"])},
        optional={
            "text": VALUES,
            "image_url": VALUES | st.fixed_dictionaries({"url": VALUES}),
            "vilam3": VALUES,
        },
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | VALUES, "content": VALUES | PARTS},
        optional={"name": VALUES, "type": VALUES},
    ),
    max_size=3,
)
OPTIONS = st.fixed_dictionaries(
    {}, optional={"experts": VALUES, "axis": VALUES, "slice": VALUES, "window": VALUES, "modality": VALUES}
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        **{name: VALUES for name in NAMES if name not in ("messages", "input", "vilam3")},
        "messages": MESSAGES | VALUES,
        "input": MESSAGES | VALUES,
        "vilam3": OPTIONS | VALUES,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, path=st.sampled_from([CHAT, RESPONSES]), drop=st.sets(st.sampled_from(NAMES)))
def test_no_body_is_an_internal_error(http, body, path, drop):
    body = {key: value for key, value in body.items() if key not in drop - {"messages", "input"}}
    limit, other = ("max_tokens", "max_output_tokens")[:: 1 if path == CHAT else -1]
    body = {limit: 1, **body}
    body.pop(other, None)
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    found = http.post(path, content=content, headers={"Content-Type": "application/json"})
    if found.status_code != 200:
        refused(found, status=404 if found.status_code == 404 else 400)


LEAVES = [{"type": "string"}, {"type": "integer"}, {"enum": ["a", 1]}, {"type": "null"}, True, False, {}]
KEYWORDS = ["type", "pattern", "enum", "$ref", "minLength", "maximum", "format"]
SCHEMAS = st.recursive(
    st.sampled_from(LEAVES) | st.dictionaries(st.sampled_from(KEYWORDS), VALUES),
    lambda inner: st.fixed_dictionaries(
        {"type": st.sampled_from(["object", "array"])},
        optional={
            "properties": st.dictionaries(st.text(max_size=3), inner, max_size=2),
            "items": inner,
            "anyOf": st.lists(inner, max_size=2),
            "required": st.lists(st.text(max_size=3), max_size=2),
        },
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS)
def test_no_schema_is_an_internal_error(http, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = changed(response_format=form, max_tokens=3, vilam3={"experts": False})
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    found = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    if found.status_code != 200:
        refused(found)
