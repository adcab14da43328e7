"""The annotation command: continues after failures, resumes, and reports problems."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import expert_helpers
import numpy as np
import pydicom
import pytest
from vilam3_experts import descriptors
from vilam3_experts.annotate import annotate
from vilam3_experts.cli import main
from vilam3_experts.inputs import find_inputs

from vilam3_jax.data.experts.cards import load_cards
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.errors import UserError


@pytest.fixture(autouse=True)
def _keep_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_bad_file_is_skipped_and_the_run_goes_on(plugin, images, tmp_path):
    store = tmp_path / "store"
    summary = annotate(descriptors.get("FAKE"), images, store)
    assert summary.counts == {"annotated": 2, "unreadable": 1}
    (problem,) = json.loads((store / "problems-FAKE.json").read_text())
    assert problem["input"] == "b damaged.png" and problem["reason"]
    records = AnnotationStore(store)
    values = sorted(records.get(*key).probabilities["bright"] for key in records.keys())  # noqa: SIM118
    assert values == pytest.approx([0.2, 0.8])
    again = annotate(descriptors.get("FAKE"), images, store)
    assert again.counts == {"skipped": 2, "unreadable": 1}


@pytest.mark.parametrize(
    ("args", "reason"), [("raise", "RuntimeError: bad thing"), ("decline", "not my field")]
)
def test_failures_are_stored_with_their_reason(plugin, images, tmp_path, args, reason):
    fake = descriptors.get("FAKE")
    assert annotate(fake, images, tmp_path / "s", args=args).counts["failed"] == 2
    store = AnnotationStore(tmp_path / "s")
    assert {store.get(*key).reason for key in store.keys()} == {reason}  # noqa: SIM118
    assert annotate(fake, images, tmp_path / "s", args=args).counts["skipped"] == 2
    assert annotate(fake, images, tmp_path / "s", args=args, retry_failed=True).counts["failed"] == 2


def test_stopped_run_keeps_what_it_has(images, tmp_path, environment):
    """SIGTERM while the second image hangs: the first record is stored, and the next run skips it."""
    store = tmp_path / "store"
    command = [sys.executable, "-m", "vilam3_experts", "annotate", "--expert", "FAKE", "--args", "dim only"]
    command += ["--data", str(images), "--out", str(store)]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    mark = pathlib.Path(environment["FAKE_MARK"])
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        assert child.poll() is None, child.stderr.read().decode()
        time.sleep(0.05)
    child.terminate()
    child.communicate(timeout=30)
    assert child.returncode == 143
    assert len(AnnotationStore(store)) == 1
    (images / "deeper" / "c bright.png").unlink()
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "0 annotated, 1 skipped, 0 failed, 1 unreadable" in out.stdout


def test_command_line(plugin, images, tmp_path, capsys):
    common = ["annotate", "--data", str(images), "--out", str(tmp_path / "store")]
    assert main([*common, "--expert", "FAKE", "--verbose"]) == 0
    captured = capsys.readouterr()
    assert "FAKE: 2 annotated, 0 skipped, 0 failed, 1 unreadable" in captured.out
    assert "unreadable" in captured.err and "[b damaged.png]" in captured.err
    assert "1 unreadable" in captured.out and "bright 0.200" in captured.out
    assert main([*common, "--expert", "FAKE", "--args", "raise"]) == 2  # no annotation
    assert "--retry-failed" not in capsys.readouterr().out
    main([*common, "--expert", "FAKE", "--args", "raise"])
    assert "FAKE: 2 stored answers are failures; --retry-failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--expert", "NOSUCH"], "no expert 'NOSUCH'"),
        (["--expert", "FAKE", "--args", "x"], "no argument 'x'"),
        (["--expert", "FAKE", "--limit", "0"], "--limit 0"),
        (["--expert", "BRAINSEG"], "contains no volume that BRAINSEG reads"),
        (["--expert", "PNEUMONIA"], "give --weights"),
        (["--expert", "PNEUMONIA", "--weights", "/nonexistent"], "no such weights folder"),
        (["--expert", "FAKE", "--data", "/nonexistent"], "no such file or folder"),
    ],
)
def test_mistakes_cost_one_line(plugin, images, tmp_path, capsys, extra, message):
    code = main(["annotate", "--data", str(images), "--out", str(tmp_path / "store"), *extra])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_list_and_weights(plugin, tmp_path, capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for card in load_cards("quickstart"):
        assert card.render() in out
    assert "FAKE  version 1" in out
    assert main(["weights"]) == 0
    out = capsys.readouterr().out
    assert "licence: none stated" in out and "deepbet==1.0.2" in out
    assert main(["weights", "--weights", str(tmp_path)]) == 1
    assert "missing" in capsys.readouterr().out


def test_two_experts_of_one_name_are_refused(plugin, monkeypatch):
    monkeypatch.setattr(descriptors, "BUILT_IN", (*descriptors.BUILT_IN, descriptors.BUILT_IN[0]))
    assert "FAKE" in descriptors.registry()
    import dataclasses

    import fake_plugin

    other = dataclasses.replace(fake_plugin.FAKE, version="2")
    monkeypatch.setattr(descriptors, "BUILT_IN", (*descriptors.BUILT_IN, other))
    with pytest.raises(UserError, match="second expert named FAKE"):
        descriptors.registry()


def write_ct(path, series, z):
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    header.SeriesInstanceUID, header.Modality = series, "CT"
    header.Rows = header.Columns = 4
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation = 15, 1
    header.RescaleSlope, header.RescaleIntercept = 1, 0
    header.ImagePositionPatient, header.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
    header.PixelSpacing, header.PixelData = [1, 1], np.full(16, z, "<i2").tobytes()
    path.parent.mkdir(exist_ok=True)
    header.save_as(path, enforce_file_format=True)


def test_plain_folders(tmp_path):
    for name in ("x.nii.gz", "y.NRRD", "z/w.nii", "note.txt", ".hidden.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    expert_helpers.write_png(tmp_path / "picture.png", 1)
    (tmp_path / "damaged.dcm").write_bytes(b"\0" * 128 + b"DICM")
    for series in ("1.2.3", "1.2.4"):
        for z in range(3):
            write_ct(tmp_path / "study" / f"{series}_{z}", series, z)
    volumes = find_inputs(tmp_path, descriptors.BRAINSEG)
    names = [item.name for item in volumes]
    both = [name for name in names if name.startswith("study/")]
    assert names == ["damaged.dcm", *both, "x.nii.gz", "y.NRRD", "z/w.nii"]
    assert [item.load().first.voxels.shape for item in volumes if item.series] == [(4, 4, 3), (4, 4, 3)]
    for damaged in (item for item in volumes if item.series is None):
        with pytest.raises(UserError, match=damaged.path.name):
            damaged.load()
    images = find_inputs(tmp_path, descriptors.PNEUMONIA)
    assert [item.name for item in images] == ["damaged.dcm", "picture.png"]
    (single,) = find_inputs(tmp_path / "picture.png", descriptors.PNEUMONIA)
    assert single.name == "picture.png"
