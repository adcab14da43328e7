"""Tests of de-identification of folders: reports, mappings, reruns, refused folders and crashes."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG2MPML, EncapsulatedPDFStorage, generate_uid

from tests.data.identified_files import MARK, SALT, UID_MARK, assert_no_mark, image, picture, stored
from vilam3_jax import cli
from vilam3_jax.data.deidentify import deidentify, run
from vilam3_jax.data.deidentify.main import main
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import UserError


def ct_series(folder, count=4, **more):
    common = {
        k: f"{UID_MARK}.{generate_uid()[-12:].lstrip('0')}" for k in ("SeriesInstanceUID", "StudyInstanceUID")
    }
    for k in range(count):
        stored(
            image(
                picture() + np.uint16(50 * k),
                ImagePositionPatient=[-10.123456, 20, 2.5 * k],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                PixelSpacing=[0.7, 0.7],
                SliceThickness=2.5,
                RescaleSlope=1,
                RescaleIntercept=-1024,
                InstanceNumber=k + 1,
                **common,
                **more,
            ),
            folder / f"{MARK}_{k}.dcm",
        )


def tree(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def folders(tmp_path):
    source = tmp_path / "source"
    ct_series(source / f"{MARK} DOE" / "a")
    ct_series(source / f"{MARK} DOE" / "b", PatientPosition="HFS")
    (tmp_path / "salt").write_bytes(SALT)
    return source, tmp_path / "out"


def test_volumes_are_the_same_before_and_after(folders) -> None:
    source, out = folders
    report = deidentify(source, out)
    assert (report["patients"], report["studies"], report["series"]) == (1, 2, 2)
    (patient,) = [p for p in out.iterdir() if p.is_dir()]
    before = [load_volume(source / f"{MARK} DOE" / name) for name in "ab"]
    for folder in patient.iterdir():
        after = load_volume(folder)
        assert any(
            np.array_equal(after.voxels, b.voxels) and np.array_equal(after.affine, b.affine) for b in before
        )


def test_report_names_attributes_and_no_values(folders, capsys) -> None:
    source, out = folders
    stored(image(modality="US", patient=MARK), source / "us.dcm")
    (source / f"{MARK}.txt").write_text(MARK)
    (source / "DICOMDIR").write_bytes(Path(get_testdata_file("DICOMDIR") or "").read_bytes())
    (source / "link.dcm").symlink_to("/etc/hostname")
    (source / "folder").symlink_to("/etc")
    (source / "twin.dcm").write_bytes((source / "us.dcm").read_bytes())
    (source / "empty").write_bytes(b"")
    os.mkfifo(source / "pipe")
    whole = (source / "us.dcm").read_bytes()
    (source / "cut.dcm").write_bytes(whole[:-100])
    (source / "meta_only.dcm").write_bytes(whole[:400])
    for sop_class in (EncapsulatedPDFStorage, "1.2.840.10008.5.1.4.1.1.88.11", f"{UID_MARK}.5"):
        stored(image(sop_class=sop_class), source / f"{sop_class}.dcm")
    video = image(PixelData=encapsulate([b"\0\0\1\xb3"]))
    video.file_meta.TransferSyntaxUID = MPEG2MPML
    stored(video, source / "video.dcm")
    before = tree(source)
    assert main(["--source", str(source), "--out", str(out), "--workers", "2"]) == 0
    printed = capsys.readouterr()
    assert tree(source) == before
    text = (out / "report.json").read_text()
    report = json.loads(text)
    assert_no_mark((text + printed.out + printed.err).encode())
    assert_no_mark("".join(str(p.relative_to(out)) for p in out.rglob("*")).encode())
    assert report["complete"] and report["profile"].startswith("DICOM PS3.15 2026c")
    assert report["files"]["written"] == 9 and report["files"]["seen"] == 8 + 14
    assert sum(report["skipped"].values()) == report["files"]["skipped"] == 13
    assert {
        "not a DICOM file",
        "DICOMDIR, an index of other files",
        "symbolic link, not followed",
        "copy of another file",
        "not an image that can be cleaned: Encapsulated PDF Storage",
        "not an image that can be cleaned: Basic Text SR Storage",
        "not an image that can be cleaned: unknown",
        "pixels in a format that cannot be cleaned: MPEG2 Main Profile / Main Level",
    } < set(report["skipped"])
    assert sum(n for reason, n in report["skipped"].items() if "damaged" in reason) == 2
    assert report["attributes"]["replaced"]["(0010,0010) PatientName"] == 9
    (suspect,) = report["suspects"]
    assert (out / suspect).exists() and re.fullmatch(r"P\w{11}/S\w{12}/\w{16}\.dcm", suspect)
    assert "salt was not stored" in printed.out and "1 may show" in printed.out


def test_suspects_can_be_refused(folders, capsys) -> None:
    source, out = folders
    stored(image(modality="US"), source / "us.dcm")
    common = ["--source", str(source), "--out", str(out), "--workers", "1"]
    assert main([*common, "--refuse-suspects"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["files"]["written"] == 8 and report["suspects"] == {}
    (reason,) = report["skipped"]
    assert reason == "may show identifying text: BurnedInAnnotation is not stated, modality US"
    assert "8 of 9 files written: 1 patients, 2 studies, 2 series" in capsys.readouterr().out


def test_same_salt_same_result_and_reruns(folders, tmp_path) -> None:
    source, out = folders
    salt = tmp_path / "salt"
    deidentify(source, out, salt_file=salt)
    first = tree(out)
    (out / next(name for name in first if name.endswith(".dcm"))).unlink()  # as after an interrupted run
    (out / "report.json").write_text(
        json.dumps(
            {"tool": "vilam3 data deidentify", "run": json.loads((out / "report.json").read_text())["run"]}
        )
    )
    deidentify(source, out, salt_file=salt)
    assert tree(out) == first
    deidentify(source, tmp_path / "again", salt_file=salt, workers=1)
    assert tree(tmp_path / "again") == first
    deidentify(source, tmp_path / "random")
    assert not first.keys() & tree(tmp_path / "random").keys() - {"report.json"}
    for more in ({}, {"salt_file": salt, "keep_characteristics": True}):
        with pytest.raises(UserError, match="another salt or other options"):
            deidentify(source, out, **more)


def test_mapping_leads_back_and_is_private(folders, tmp_path, capsys) -> None:
    source, out = folders
    (source / "x.txt").write_text("x")
    mapping = tmp_path / "mapping.csv"
    common = ["--source", str(source), "--workers", "1", "--mapping"]
    assert main([*common, str(mapping), "--out", str(out)]) == 0
    assert "identifies the patients" in capsys.readouterr().out
    assert mapping.stat().st_mode & 0o077 == 0
    rows = list(csv.DictReader(mapping.open()))
    assert len(rows) == 9
    for row in rows:
        if row["copy"]:
            copy, original = pydicom.dcmread(out / row["copy"]), pydicom.dcmread(row["source"])
            assert copy.PixelData == original.PixelData
            assert (row["original PatientID"], row["new PatientID"]) == ("12345", copy.PatientID)
        else:
            assert row["reason"] == "not a DICOM file"
    command = ["data", "deidentify", *common]
    assert cli.main([*command, str(mapping), "--out", str(tmp_path / "b")]) == 2
    assert cli.main([*command, str(tmp_path / "c" / "map"), "--out", str(tmp_path / "c")]) == 2
    assert "the secret file of --mapping" in capsys.readouterr().err


def test_folders_that_are_refused(folders, tmp_path) -> None:
    source, _ = folders
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "short").write_bytes(b"123")
    before = tree(tmp_path)
    for out, more, words in [
        (source, {}, "is inside the source"),
        (source / "sub", {}, "is inside the source"),
        (tmp_path / "link" / "sub", {}, "is inside the source"),
        (tmp_path, {}, "contains the source"),
        (tmp_path / "full", {}, "not empty"),
        (tmp_path / "salt", {}, "is a file"),
        (tmp_path / "new", {"salt_file": tmp_path / "short"}, "3 bytes, fewer than 16"),
        (tmp_path / "new", {"salt_file": tmp_path / "none"}, "no such file"),
        (tmp_path / "new", {"salt_file": tmp_path / "new" / "salt"}, "the secret file of --salt-file"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            deidentify(source, out, **more)
        assert "\n" not in str(error.value)
    assert tree(tmp_path) == before
    with pytest.raises(UserError, match="no such folder"):
        deidentify(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(UserError, match=r"no image was de-identified \(1 not a DICOM file"):
        deidentify(tmp_path / "full", tmp_path / "new")


class FragilePool(contextlib.nullcontext):
    """A pool that breaks at one file, as if a decoder had ended its process."""

    def __enter__(self):
        return self

    def map(self, function, *lists):
        for batch, options in zip(*lists, strict=True):
            if any("fatal" in path for path in batch):
                raise BrokenProcessPool
            yield [run.clean_file(path, options) for path in batch]

    def submit(self, function, batch, options):
        future = Future()
        if "fatal" in batch[0]:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result([run.clean_file(batch[0], options)])
        return future


def test_a_crash_costs_one_file(folders, monkeypatch) -> None:
    source, out = folders
    (source / "fatal.dcm").write_bytes(b"x")
    monkeypatch.setattr(run, "_pool", FragilePool)
    monkeypatch.setattr(run, "_BATCH", 3)
    report = deidentify(source, out, workers=1)
    assert report["files"]["written"] == 8
    assert [n for reason, n in report["skipped"].items() if "crashed" in reason] == [1]


def test_without_dicognito_the_extra_is_named(folders, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dicognito.anonymizer", None)
    with pytest.raises(UserError, match=r"pip install 'vilam3-jax\[dicom\]'"):
        deidentify(*folders)
