"""Decoding in a child process: equal results, and a one-line error for every failure of the child."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
import warnings

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from vilam3_jax.data import isolation
from vilam3_jax.data.images import LoadedImage, load_image
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.volumes import read_volume
from vilam3_jax.errors import InputWarning, UnavailableError, UserError

# A child whose volume reader fails in the way given by the file name.
FAKE = """
import ctypes, os, sys, time, warnings
import numpy as np
from vilam3_jax.data import isolation, volumes
from vilam3_jax.errors import InputWarning
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UnavailableError, UserError

def read_volume(path, **keywords):
    word = os.path.basename(path)
    if word == "segfault":
        ctypes.string_at(0)
    if word == "sleep":
        time.sleep(100)
    if word == "allocate":
        np.ones(1 << 30, np.uint8)
    if word == "write":
        with open(keywords["to"], "wb") as file:
            for _ in range(40):
                file.write(bytes(8 << 20))
    if word == "exit":
        os._exit(3)
    if word == "kill":
        os.kill(os.getpid(), 9)
    if word == "nonsense":
        os.write(answers, b"\\0\\0\\0\\1x")
    if word == "bug":
        raise IndexError("Doe^Jane")
    if word == "disk":
        raise UnavailableError(f"{path}: the disk fails")
    if word == "chatter":
        print("from Python"); os.write(1, b"from C"); os.write(2, b"from C")
        assert sys.stdin.read() == ""
    if word == "warn":
        warnings.warn("Doe^Jane", UserWarning)
        warnings.warn(f"{path}: the affine was repaired", InputWarning)
    voxels = np.arange(6, dtype=np.int16).reshape(1, 2, 3)
    notes = tuple(sorted(os.environ)) if word == "environment" else (str(keywords.get("window")),)
    if word == "files":
        notes = tuple(os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd"))
    return Volume(voxels, np.eye(4), word, valid=voxels > 2, window=(np.float64(40), 80.0), notes=notes)

answers = os.dup(1)
volumes.read_volume = read_volume
sys.exit(isolation.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def fake():
    with DecoderProcess(timeout=30, memory_bytes=256 << 20, command=(sys.executable, "-c", FAKE)) as process:
        yield process


@pytest.fixture(scope="module")
def decoder():
    with DecoderProcess() as process:
        yield process


def assert_same(one, other):
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b), field.name
        else:
            assert a == b and type(a) is type(b), field.name


def test_volumes_cross_unchanged(decoder, tmp_path):
    rng = np.random.default_rng(0)
    affine = np.array([[0, -0.8, 0, 3], [0.7, 0, 0, 5], [0, 0, 2.5, 9], [0, 0, 0, 1]])
    for dtype in (np.int16, np.int32, np.float32):
        values = (rng.random((5, 6, 7)) * 1e5).astype(dtype)
        if dtype is np.float32:
            values[1, 2, 3] = np.nan  # so that `valid` is transferred, too
        path = tmp_path / f"{np.dtype(dtype).name}.nii.gz"
        nib.Nifti1Image(values, affine).to_filename(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            here, there = read_volume(path, modality="MR"), decoder.read_volume(path, modality="MR")
        assert_same(there, here)
        assert there.content_key == here.content_key


def test_images_cross_unchanged(decoder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    picture = decoder.load_image(tmp_path / "picture.png", alpha="ignore", frame=0)
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert_same(picture, load_image(tmp_path / "picture.png"))


def test_errors_and_limits_cross_unchanged(decoder, tmp_path):
    path = tmp_path / "scan.nii"
    nib.Nifti1Image(np.zeros((5, 6, 7), np.int16), np.eye(4)).to_filename(path)
    for name, keywords in (("scan.nii", {"limits": Limits(voxels=100)}), ("missing.nii", {})):
        with pytest.raises(UserError) as here:
            read_volume(tmp_path / name, **keywords)
        with pytest.raises(UserError) as there:
            decoder.read_volume(tmp_path / name, **keywords)
        assert str(there.value) == str(here.value)
        assert there.type is here.type


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("segfault", "the decoder crashed (signal 11)"),
        ("exit", "the decoder ended with exit code 3"),
        ("kill", "was killed (signal 9), most likely because memory ran out"),
        ("nonsense", "the decoder returned an invalid answer"),
        ("bug", "cannot be decoded (IndexError in the reader)"),
        pytest.param(
            "allocate",
            "decoding needs more than 0.25 GiB of memory",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's"),
        ),
    ],
)
def test_what_happens_to_the_child_is_one_sentence(fake, tmp_path, word, message):
    with pytest.raises(UserError) as error:
        fake.read_volume(tmp_path / word)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / word}: ") and message in text
    assert "\n" not in text and "Doe" not in text
    assert not isinstance(error.value, UnavailableError)
    assert fake.read_volume(tmp_path / "fine").source == "fine"


def test_time_is_bounded(tmp_path):
    with DecoderProcess(timeout=0.5, command=(sys.executable, "-c", FAKE)) as fake:
        assert fake.read_volume(tmp_path / "fine").source == "fine"
        start = time.monotonic()
        with pytest.raises(UserError, match=r"sleep: decoding took more than 0\.5 s"):
            fake.read_volume(tmp_path / "sleep")
        assert time.monotonic() - start < 5


def test_what_the_child_writes_is_bounded(fake, tmp_path):
    with pytest.raises(UserError, match="cannot be decoded"):
        fake.read_volume(tmp_path / "write", to=os.fspath(tmp_path / "big"))
    assert (tmp_path / "big").stat().st_size <= 256 << 20


def test_the_class_of_a_failing_disk_crosses(fake, tmp_path):
    with pytest.raises(UnavailableError, match="the disk fails"):
        fake.read_volume(tmp_path / "disk")


def test_what_decoders_print_is_not_taken_for_an_answer(fake, tmp_path, capfd):
    assert fake.read_volume(tmp_path / "chatter").source == "chatter"
    assert capfd.readouterr() == ("", "")


def test_numbers_keep_their_types(fake, tmp_path):
    volume = fake.read_volume(tmp_path / "fine", window=(np.float32(1), 2))
    assert volume.notes == ("(1.0, 2)",)
    assert volume.window == (40.0, 80.0) and type(volume.window[0]) is float
    assert volume.valid is not None and volume.valid.dtype == bool and volume.valid.sum() == 3


def test_secrets_and_open_files_stay_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with (
        open(tmp_path / "secret", "w") as secret,
        DecoderProcess(command=(sys.executable, "-c", FAKE)) as fake,
    ):
        os.set_inheritable(secret.fileno(), True)
        names = fake.read_volume(tmp_path / "environment").notes
        assert "PATH" in names and "HF_TOKEN" not in names
        files = fake.read_volume(tmp_path / "files").notes
        assert any("memfd:decoded" in name for name in files)
        assert not any("secret" in name for name in files)


def test_object_stores_are_refused(decoder):
    with pytest.raises(UserError, match="copy it to a local disk"):
        decoder.read_volume("gs://bucket/scan.nii.gz")


def test_a_child_that_cannot_start_says_so(tmp_path):
    for command in (("/no/such/program",), (sys.executable, "-c", "raise SystemExit(7)")):
        with (
            DecoderProcess(command=command) as broken,
            pytest.raises(UnavailableError, match="does not start"),
        ):
            broken.read_volume(tmp_path / "scan.nii")


def test_the_child_ends_with_its_parent(tmp_path):
    program = f"""
import os
from vilam3_jax.data.isolation import DecoderProcess
decoder = DecoderProcess()
try:
    decoder.read_volume({str(tmp_path / "missing.nii")!r})
except Exception:
    print(decoder._process.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        with open(f"/proc/{child}/stat") as state:
            if state.read().rsplit(")", 1)[1].split()[0] == "Z":  # a zombie: it ended
                break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{child}")


def test_the_child_needs_no_jax():
    program = (
        "import sys, vilam3_jax.data.isolation\n"
        "print({'jax', 'flax', 'torch', 'grain'} & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_answers_larger_than_what_is_stored_are_refused():
    with isolation._anonymous_file() as store:
        message = isolation._pack(LoadedImage(np.zeros((2, 3, 3), np.uint8)), store)
        for shape in ([1 << 40], [-1, 4], [19]):
            with pytest.raises(isolation.FrameError):
                isolation._unpack(LoadedImage, {**message, "arrays": [["pixels", "|u1", shape]]}, store)
