"""Tests of `vilam3 data scan`: agreement with the readers, privacy, and unusual folder contents."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jsonschema
import nibabel as nib
import numpy as np
import pydicom
import pytest
from etils.epath import testing
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from vilam3_jax import cli
from vilam3_jax.data import folder_walk
from vilam3_jax.data.dicom import read_image, read_listed, survey
from vilam3_jax.data.dicom.frames import short_identifier
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.scan import collect as collect_lib
from vilam3_jax.data.scan import records, redaction, report
from vilam3_jax.data.scan.collect import collect
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import UserError

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "data_scan.schema.json").read_text())
AXIAL = [1, 0, 0, 0, 1, 0]


def image(series: str, **changes) -> Dataset:
    """A CT slice of 4 x 5 pixels; a change to None removes the element."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID, d.SOPInstanceUID, d.Modality = CTImageStorage, generate_uid(), "CT"
    d.StudyInstanceUID, d.SeriesInstanceUID, d.BodyPartExamined = "1.2.1", f"1.2.3.{series}", "CHEST"
    d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = 4, 5, 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
    d.PixelData = np.arange(20, dtype="<i2").tobytes()
    d.ImageOrientationPatient, d.PixelSpacing, d.SliceThickness = AXIAL, [0.5, 0.5], 2
    d.RescaleSlope, d.RescaleIntercept = 1, 0
    for key, value in changes.items():
        d.pop(key, None) if value is None else setattr(d, key, value)
    return d


def save(path: Path, dataset: Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def stack(folder: Path, series: str, count: int = 5, **changes) -> list[Path]:
    return [
        save(
            folder / f"{series}_{number}.dcm",
            image(
                series, **{"ImagePositionPatient": [0, 0, 2 * number], "InstanceNumber": number, **changes}
            ),
        )
        for number in range(count)
    ]


def colour(series: str, **changes) -> Dataset:
    return image(
        series,
        **{
            "SOPClassUID": SecondaryCaptureImageStorage,
            "SamplesPerPixel": 3,
            "PhotometricInterpretation": "RGB",
            "PlanarConfiguration": 0,
            "BitsAllocated": 8,
            "BitsStored": 8,
            "HighBit": 7,
            "PixelRepresentation": 0,
            "PixelData": bytes(60),
            "RescaleSlope": None,
            "RescaleIntercept": None,
            **changes,
        },
    )


def scan(folder: Path | str, tmp_path: Path, capsys, *arguments: str) -> tuple[dict, str]:
    """Runs the command and returns its JSON and text."""
    out = tmp_path / "out of the way" / "result.json"
    assert cli.main(["data", "scan", str(folder), "--json", str(out), *arguments]) == 0
    result = json.loads(out.read_text())
    jsonschema.validate(result, SCHEMA)
    summary = result["summary"]
    assert summary["files"] == summary["used_files"] + summary["skipped_files"] + summary["other_files"]
    assert summary["skipped_files"] == sum(entry["files"] for entry in result["skipped"])
    return result, capsys.readouterr().out


@pytest.fixture
def hospital(tmp_path) -> Path:
    """Typical series of a hospital, usable and unusable, and other files."""
    folder = tmp_path / "hospital"
    stack(folder / "ct", "1")
    stack(folder / "ct", "2")[2].unlink()  # leaves a gap
    stack(folder / "mr", "3", Modality="MR", EchoTime=10)
    for number, path in enumerate(stack(folder / "mr", "4", Modality="MR", EchoTime=20)):
        dataset = pydicom.dcmread(path)  # a second echo of series 3
        dataset.SeriesInstanceUID, dataset.EchoNumbers = "1.2.3.3", 2
        save(folder / "mr" / f"echo2_{number}.dcm", dataset)
        path.unlink()
    cut = stack(folder / "cut", "5")[2]  # an inner slice
    cut.write_bytes(cut.read_bytes()[:-30])
    cut = stack(folder / "cut", "6")[-1]  # the last slice
    cut.write_bytes(cut.read_bytes()[:-30])
    stack(folder / "odd", "7", PhotometricInterpretation="MONOCHROME9")
    stack(folder / "odd", "8", BitsAllocated=12)
    stack(folder / "odd", "9", ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    stack(folder / "copies", "10")
    save(folder / "copies" / "again.dcm", image("10", ImagePositionPatient=[0, 0, 4], InstanceNumber=2))
    save(folder / "us.dcm", colour("11", SOPClassUID=UltrasoundMultiFrameImageStorage, Modality="US",
                                   NumberOfFrames=3, PixelData=bytes(180)))  # fmt: skip
    save(folder / "capture.dcm", colour("12", Modality="OT", BodyPartExamined=None))
    save(folder / "report.dcm", image("13", SOPClassUID=BasicTextSRStorage, Modality="SR", Rows=None,
                                      Columns=None, PixelData=None))  # fmt: skip
    stack(folder / "compressed", "14")
    (folder / "notes.txt").write_text("a text")
    (folder / "empty.dcm").touch()
    Image.new("L", (7, 9)).save(folder / "a.png")
    nifti(folder / "a.nii.gz")
    return folder


def nifti(path: Path, shape=(3, 4, 5), **fields) -> Path:
    scan_ = nib.Nifti1Image(np.zeros(shape, np.int16), np.diag([2.0, 2, 3, 1]))
    scan_.header.set_xyzt_units("mm")
    for key, value in fields.items():
        scan_.header[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(scan_, path)
    return path


# ---- agreement with the readers


def test_scan_and_load_volume_agree(hospital, tmp_path, capsys, monkeypatch) -> None:
    result, _ = scan(hospital, tmp_path, capsys)
    uses = {}
    for one in result["series"]:
        uses.setdefault(one["use"], []).append(one)
        if one["use"] == "volume":
            volume = load_volume(hospital, series=one["id"])
            assert sorted(volume.voxels.shape) == sorted((one["columns"], one["rows"], one["slices"])) or any(
                "end of the stack" in note for note in one["notes"]
            )
            assert sorted(volume.spacing) == pytest.approx(sorted(one["spacing_mm"]))
            assert (volume.modality, volume.body_part) == (one["modality"], one["body_part"])
        elif one["use"] != "undecided":
            with pytest.raises(UserError) as refused:
                load_volume(hospital, series=one["id"])
            unknown = "unsupported photometric interpretation"  # the reader quotes the file
            reason = "is not supported" if one["problem"] == unknown else one["problem"]
            if reason == "truncated pixel data":
                reason = "is cut short"
            assert reason in str(refused.value)
    assert {use: len(series) for use, series in uses.items()} == {
        "volume": 5,  # 1, 3/1, 3/2, 6, 14
        "images": 2,
        "undecided": 1,
        "no": 6,  # 2, 5, 7, 8, 9, 13
    }
    assert {one["kind"] for one in uses["images"]} == {"image", "cine"}
    assert load_volume(hospital, series=uses["undecided"][0]["id"])  # the duplicate has equal pixels
    (grid,) = result["volumes"]
    assert (grid["shape"], grid["spacing_mm"], grid["orientation"]) == ([3, 4, 5], [2, 2, 3], "RAS")
    assert load_volume(hospital / "a.nii.gz").voxels.shape == (3, 4, 5)


def test_pydicoms_own_files_agree(tmp_path, capsys) -> None:
    folder = Path(get_testdata_file("CT_small.dcm")).parent
    result, text = scan(folder, tmp_path, capsys)
    assert len(result["series"]) > 40 and "and " in text and max(map(len, text.splitlines())) <= 120
    listed = {series.identifier: series for series in survey(folder)[0]}
    assert len(listed) == len(result["series"])
    for one in result["series"]:
        if one["use"] == "volume":
            assert read_listed(listed[one["id"]], folder).values.ndim == 3
        else:
            with pytest.raises(UserError):
                read_listed(listed[one["id"]], folder)


def test_cut_short_images_are_not_offered(tmp_path, capsys) -> None:
    whole = save(tmp_path / "in" / "whole.dcm", colour("1"))
    cut = save(tmp_path / "in" / "cut.dcm", colour("1"))
    cut.write_bytes(cut.read_bytes()[:-40])
    result, _ = scan(tmp_path / "in", tmp_path, capsys)
    (one,) = result["series"]
    assert one["use"] == "images" and one["files"] == 1
    assert one["skipped"] == [{"reason": "truncated pixel data", "files": 1}]
    assert read_image(whole).pixels.shape == (4, 5, 3)
    with pytest.raises(UserError):
        read_image(cut)


def test_pixels_without_a_decoder_are_a_problem(tmp_path, capsys, monkeypatch) -> None:
    for path in stack(tmp_path / "in", "1"):
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    assert scan(tmp_path / "in", tmp_path, capsys)[0]["series"][0]["use"] == "volume"
    monkeypatch.setattr(records, "is_decodable", lambda syntax: False)
    records._known_layouts.clear()
    result, text = scan(tmp_path / "in", tmp_path, capsys)
    assert "no decoder for the transfer syntax RLE" in result["series"][0]["problem"]
    assert "pip install 'vilam3-jax[dicom]'" in text
    records._known_layouts.clear()


def test_limits_are_those_of_the_reader(tmp_path) -> None:
    stack(tmp_path, "1")
    nifti(tmp_path / "a.nii")
    for limits in (Limits(voxels=50), Limits(file_bytes=400)):
        found = collect(tmp_path, 1, limits)
        assert found.series[0].use == "no" and "more than the limit" in found.series[0].problem
        assert "more than the limit" in next(r.problem for r in found.files if r.reader == "nifti")
        with pytest.raises(UserError, match="more than the limit"):
            load_volume(tmp_path, series=found.series[0].id, limits=limits)


# ---- privacy


SECRETS = ("SMITHSON", "MRN4711", "19480229", "Wilhelmina", "StMary", "geheim")


def planted(vr: str, number: int) -> object:
    secret = SECRETS[number % len(SECRETS)]
    if vr == "PN":
        return f"{secret}^{secret}"
    if vr == "DA":
        return "19480229"
    if vr == "AS":
        return "093Y"
    if vr == "CS":
        return secret.upper()[:16]
    return secret if vr == "AE" else f"{secret} {number}"


def patients_slice(number: int, *, geometry: bool) -> Dataset:
    """A slice with an identifier in every element whose VR allows text."""
    d = image("9", ImagePositionPatient=[0, 0, 2 * number])
    d.SeriesInstanceUID = "1.2.840.4711.19480229.7"
    d.StudyInstanceUID, d.SOPInstanceUID = "1.2.840.4711.19480229", f"1.2.840.4711.19480229.7.{number}"
    kept = {"SpecificCharacterSet", "TransferSyntaxUID"}
    if geometry:
        kept |= {element.keyword for element in d}
    strings = ("AE", "AS", "CS", "DA", "LO", "LT", "PN", "SH", "ST", "UC", "UT")
    for tag, (vr, vm, _, retired, keyword) in DicomDictionary.items():
        if vr in strings and keyword and not retired and tag >> 16 > 2 and keyword not in kept:
            value = planted(vr, tag % 97)
            try:
                d.add_new(tag, vr, value if vm[0] == "1" else [value] * int(vm[0]))
            except ValueError:
                continue
    block = d.private_block(0x0029, "SMITHSON MAKER", create=True)
    for offset, vr in enumerate(strings):
        block.add_new(offset, vr, planted(vr, offset))
    nested = Dataset()
    nested.PatientName, nested.CodeMeaning = "SMITHSON", "MRN4711"
    d.ProcedureCodeSequence = [nested]
    return d


@pytest.fixture
def named(tmp_path) -> Path:
    folder = tmp_path / "in" / "SMITHSON Wilhelmina 19480229"
    inner = folder / "MRN4711"
    with pydicom.config.disable_value_validation():
        for number in range(4):
            save(inner / f"SMITHSON_{number}.dcm", patients_slice(number, geometry=True))
            one = patients_slice(number, geometry=False)
            one.SeriesInstanceUID = "1.2.840.4711.19480229.8"
            save(inner / f"geheim_{number}.SMITHSON", one)
        for number, keyword in enumerate(("Rows", "NumberOfFrames", "BitsAllocated", "ImagePositionPatient",
                                          "PixelSpacing", "SliceThickness", "EchoTime")):  # fmt: skip
            one = image("5", SeriesInstanceUID=f"1.2.3.{number}", ImagePositionPatient=[0, 0, 0])
            path = save(inner / f"StMary_{number}", one)
            tag = pydicom.tag.Tag(keyword)
            raw = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
            raw += b"LO\x0e\x00SMITHSON4711  "  # text in a numeric element
            start = path.read_bytes()
            place = start.find(raw[:4])
            place = len(start) if place < 0 else place
            path.write_bytes(start[:place] + raw + start[place:])
    for number, name in enumerate(("label", "kernel")):  # distinguishes the two stacks
        for z in range(4 + 5 * number):
            one = image("66", ImagePositionPatient=[0, 0, z], ConvolutionKernel=SECRETS[number], StackID=name)
            save(inner / f"{name}{z}.dcm", one)
    nifti(
        folder / "Wilhelmina.nii.gz", descrip=b"SMITHSON 19480229", intent_name=b"MRN4711", db_name=b"geheim"
    )
    nifti(folder / "SMITHSON_4d.nii", shape=(3, 4, 5, 2), descrip=b"SMITHSON")
    sidecar = {"PatientName": "SMITHSON", "Modality": "SMITHSON", "BodyPartExamined": "MRN4711"}
    (folder / "Wilhelmina.json").write_text(json.dumps(sidecar))
    nib.save(nib.Nifti1Pair(np.zeros((2, 3, 4), np.int16), np.eye(4)), folder / "geheim.hdr")
    (folder / "geheim.img.gz").write_bytes(gzip.compress((folder / "geheim.img").read_bytes()))
    header = "NRRD0004\ntype: {}\ndimension: 3\nsizes: 2 2 2\nencoding: raw\nendian: little\n{}\n"
    space = (
        "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
    )
    keys = "# SMITHSON\nDICOM_0010_0010_PatientName:=SMITHSON\nDICOM_0018_0015_BodyPartExamined:=Wilhelmina\n"
    for number, (kind, fields) in enumerate(
        (("short", space + keys), ("SMITHSON", space + keys), ("short", keys),
         ("short", "SMITHSON\n" + space), ("short", space.replace("origin: (0", "origin: (MRN4711")))
    ):  # fmt: skip
        (folder / f"SMITHSON{number}.nrrd").write_bytes(header.format(kind, fields).encode() + bytes(16))
    meta = "ObjectType = Image\nNDims = 3\nComment = SMITHSON\nPatientName = SMITHSON\nDimSize = 2 2 2\n"
    meta += "ElementSpacing = 1 1 1\nOffset = 0 0 0\n{}ElementType = {}\nElementDataFile = {}\n"
    turn = "TransformMatrix = 1 0 0 0 1 0 0 0 1\n"
    for number, words in enumerate(
        ((turn, "MET_SHORT", "LOCAL"), (turn, "SMITHSON", "LOCAL"), (turn, "MET_SHORT", "SMITHSON.raw"),
         (turn + "AnatomicalOrientation = SMI\n", "MET_SHORT", "LOCAL"), ("", "MET_SHORT", "../MRN4711"))
    ):  # fmt: skip
        (folder / f"StMary{number}.mha").write_bytes(meta.format(*words).encode() + bytes(16))
    Image.new("L", (5, 6)).save(folder / "SMITHSON.tif")
    (folder / "SMITHSON2.tif").write_bytes((folder / "SMITHSON.tif").read_bytes()[:-60])
    (folder / "SMITHSON.png").write_bytes(b"\x89PNG\r\n\x1a\nSMITHSON")
    (folder / "MRN4711.txt").write_text("SMITHSON")
    (folder / "geheim.SMITHSON").write_bytes(b"\x01\x02SMITHSON")
    (folder / "SMITHSON.link").symlink_to("MRN4711")
    (folder / "SMITHSON\nStMary.dcm").write_bytes(b"\0" * 128 + b"DICMSMITHSON")
    return folder


def test_nothing_that_is_printed_identifies_a_patient(named, tmp_path, capsys, caplog, recwarn) -> None:
    out = tmp_path / "result.json"
    caplog.clear()
    recwarn.clear()
    assert cli.main(["data", "scan", str(named), "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert not caplog.text and not recwarn.list
    jsonschema.validate(json.loads(out.read_text()), SCHEMA)
    for text in (printed.out, printed.err, out.read_text()):
        for secret in (*SECRETS, "4711", "1.2.840", "093Y"):
            assert secret.lower() not in text.lower(), next(
                line for line in text.splitlines() if secret.lower() in line.lower()
            )
    result = json.loads(out.read_text())
    assert len(result["series"]) >= 4 and len(result["volumes"]) >= 12  # the scan covered the folder
    assert {"unlisted"} <= {one["modality"] for one in result["series"]}
    assert {"unlisted"} <= {one["body_part"] for one in result["series"]}
    assert {"reason": "another stack", "files": 4} in result["skipped"]  # without the kernel name


def test_errors_of_the_run_name_no_file_either(named, tmp_path, capsys) -> None:
    assert cli.main(["data", "scan", str(named), "--max-files", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "more than 3 files" in error and "geheim" not in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("damaged (x 'SMITH) y' (z); export it", "damaged; export it"),
        ("damaged (never closed SMITH", "damaged"),
        ("another stack (kernel SMITH)", "another stack"),
        ("another modality (SMITH)", "another modality"),
        ("another grid (512 x 512 pixels)", "another grid (512 x 512 pixels)"),
        ("another orientation (axial)", "another orientation (axial)"),
        ("sform (RAS) and qform (LPS) contradict", "sform (RAS) and qform (LPS) contradict"),
        ("type 'SMITH' is not read", "type a value is not read"),
        ("its header's spacing and the file's name", "its header's spacing and the file's name"),
        ("/d/SMITH.hdr: pair with SMITH.img and SMITH.img.gz; keep", "pair with a file and a file; keep"),
    ],
)
def test_reasons_are_repeated_without_quotations(text: str, said: str) -> None:
    assert redaction.message(text, "/d/SMITH.hdr") == said


def test_codes_are_those_that_dicom_defines() -> None:
    words = ("CT", "PT", "SEG", "unknown", "SMITH", "C T", "ct")
    assert [redaction.modality(w) for w in words] == ["CT", "PT", "SEG", "unknown", *["unlisted"] * 3]
    words = ("CHEST", "CHEST_ABDOMEN", "WHOLE BODY", "4THVENTRICLE", "CHEST SMITH", "19480229", "")
    assert [redaction.body_part(w) for w in words] == [*words[:4], *["unlisted"] * 3]


def test_paths_go_to_a_file_of_their_own_with_a_warning(hospital, tmp_path, capsys) -> None:
    out = tmp_path / "p.json"
    assert cli.main(["data", "scan", str(hospital), "--paths", str(out)]) == 0
    printed = capsys.readouterr()
    assert "may identify patients" in printed.err and str(hospital) not in printed.out
    places = json.loads(out.read_text())
    assert "identify" in places["warning"]
    (first,) = [s for s in collect(hospital, 1, DEFAULT_LIMITS).series if s.use == "undecided"]
    assert (
        sorted(Path(p).name for p in places["series"][first.id]) == [f"10_{n}.dcm" for n in range(5)]
        or len(places["series"][first.id]) == 5
    )
    assert places["volumes"]["1"].endswith("a.nii.gz") and places["other_files"]["text file"]


# ---- unusual folder contents


def test_odd_entries_are_counted_and_never_opened(tmp_path, capsys) -> None:
    folder = tmp_path / "in"
    stack(folder / "a", "1")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "nowhere").symlink_to(folder / "none")
    (folder / "linked.dcm").symlink_to(folder / "a" / "1_0.dcm")
    (folder / ".hidden").write_bytes((folder / "a" / "1_1.dcm").read_bytes())
    (folder / "empty").touch()
    (folder / os.fsdecode(b"not\xffunicode.txt")).write_text("x")
    os.mkfifo(folder / "pipe.dcm")  # opening it would block
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s"))
        result, text = scan(folder, tmp_path, capsys, "--paths", str(tmp_path / "p.json"))
    assert {entry["reason"]: entry["entries"] for entry in result["not_files"]} == {
        folder_walk.SPECIAL: 2,
        folder_walk.LINKED_FOLDER: 1,
        folder_walk.BROKEN_LINK: 1,
    }
    assert result["summary"]["files"] == 9 and result["series"][0]["files"] == 5
    assert {e["kind"] for e in result["other_files"]} == {"empty file", "text file"}
    assert "pipe, socket or device" in text
    assert json.loads((tmp_path / "p.json").read_text())["other_files"]["text file"][0].endswith(
        "unicode.txt"
    )


def test_a_dicomdir_is_named_and_not_followed(tmp_path, capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "DICOMDIR").write_bytes(Path(get_testdata_file("DICOMDIR")).read_bytes())
    result, _ = scan(tmp_path / "in", tmp_path, capsys)
    assert result["skipped"] == [{"reason": records.DICOMDIR, "files": 1}] and not result["series"]


def test_folders_and_files_that_cannot_be_read(tmp_path, capsys, monkeypatch) -> None:
    folder = tmp_path / "in"
    closed, gone = stack(folder / "a", "1")[:2]
    (folder / "b").mkdir()
    scandir, identify = os.scandir, records.file_kinds.identify

    def forbidden(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def identified(path):
        if path == str(gone):
            gone.unlink()
        if path == str(closed):
            raise UserError(f"{path}: cannot be read (Permission denied); check the path")
        return identify(path)

    monkeypatch.setattr(folder_walk.os, "scandir", forbidden)
    monkeypatch.setattr(records.file_kinds, "identify", identified)
    result, _ = scan(folder, tmp_path, capsys)
    assert result["not_files"] == [{"reason": folder_walk.CLOSED_FOLDER, "entries": 1}]
    assert {entry["reason"] for entry in result["skipped"]} == {records.UNREADABLE, records.VANISHED}
    assert result["series"][0]["slices"] == 3


def test_a_disk_that_fails_costs_one_file(tmp_path, monkeypatch) -> None:
    first = stack(tmp_path, "1")[0]
    identify = records.file_kinds.identify

    def failing(path):
        if path == str(first):
            raise records.UnavailableError(f"{path}: cannot be read now (I/O error)")
        return identify(path)

    monkeypatch.setattr(records.file_kinds, "identify", failing)
    found = collect(tmp_path, 1, DEFAULT_LIMITS)
    assert [r.problem for r in found.files] == [records.UNAVAILABLE, None, None, None, None]


@pytest.mark.parametrize("function", ["identify", "group"])
def test_an_error_that_nobody_expects_costs_one_file_or_series(tmp_path, monkeypatch, function) -> None:
    first = stack(tmp_path, "1")[0]
    stack(tmp_path, "2")

    def broken(*arguments):
        raise KeyError("SMITHSON")

    if function == "identify":
        identify = records.file_kinds.identify
        monkeypatch.setattr(
            records.file_kinds, "identify", lambda path: (broken if path == str(first) else identify)(path)
        )
    else:
        group = records.group_files
        monkeypatch.setattr(
            records,
            "group_files",
            lambda files: (broken if (f := [*files])[0].uid == "1.2.3.1" else group)(f),
        )
    found = collect(tmp_path, 1, DEFAULT_LIMITS)
    result = report.to_json(found, 0)
    jsonschema.validate(result, SCHEMA)
    assert [s.use for s in found.series if s.id == short_identifier("1.2.3.2")] == ["volume"]
    (skipped,) = result["skipped"]
    assert skipped["files"] == (1 if function == "identify" else 5) and "(KeyError)" in skipped["reason"]
    assert "SMITHSON" not in report.to_text(result)


def test_a_header_with_absurd_numbers_is_damaged(tmp_path, capsys) -> None:
    with pydicom.config.disable_value_validation():
        dataset = image("1", ImagePositionPatient=[0, 0, 0])
        dataset.add_new("NumberOfFrames", "IS", "9" * 30)
        save(tmp_path / "in" / "a.dcm", dataset)
    result, _ = scan(tmp_path / "in", tmp_path, capsys)
    assert result["skipped"] == [{"reason": records.DAMAGED_DICOM, "files": 1}]


def test_other_readable_files(tmp_path, capsys) -> None:
    folder = tmp_path / "in"
    nifti(folder / "4d.nii", shape=(3, 4, 5, 2))
    nib.save(nib.Nifti1Pair(np.zeros((2, 3, 4), np.int16), np.eye(4)), folder / "pair.hdr")
    for number, (side, fmt) in enumerate(((8, "PNG"), (16, "JPEG"), (32, "PNG"))):
        Image.new("RGB", (side, side)).save(folder / f"{number}.{fmt.lower()}", fmt)
    Image.new("L", (5, 6)).save(
        folder / "pages.tif", save_all=True, append_images=[Image.new("L", (5, 6))] * 2
    )
    whole = (folder / "2.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:20])
    (folder / "slide.zip").write_bytes(b"PK\x03\x04" + bytes(40))
    result, text = scan(folder, tmp_path, capsys)
    kinds = {entry["kind"]: entry for entry in result["images"]}
    assert kinds["PNG image"] == {
        "kind": "PNG image", "files": 3, "usable": 2, "several_pages": 0,
        "smallest": [8, 8], "largest": [32, 32]
    }  # fmt: skip
    assert kinds["TIFF image"]["several_pages"] == 1
    problems = [entry["reason"] for entry in result["problems"]]
    assert any("4-D data with 2 volumes" in problem for problem in problems)
    assert {e["reason"] for e in result["skipped"]} >= {"damaged PNG image", records.PAIRED_IMG}
    assert [one["use"] for one in result["volumes"]] == ["no", "volume"]
    assert "zip archive: unpack it" in text


def test_large_results_are_cut_in_the_text_only(tmp_path, capsys) -> None:
    for number in range(60):
        save(tmp_path / "in" / str(number), image(str(number), ImagePositionPatient=[0, 0, 0]))
    result, text = scan(tmp_path / "in", tmp_path, capsys)
    assert len(result["series"]) == 60 and "and 10 more; --json FILE has all" in text
    assert text.count("volume") < 60


def test_next_commands_take_the_ids(hospital, tmp_path, capsys) -> None:
    result, text = scan(hospital, tmp_path, capsys)
    (line,) = [line for line in text.splitlines() if "--series=" in line]
    chosen = line.split("--series=")[1].split()[0]
    assert chosen in {one["id"] for one in result["series"] if one["use"] == "volume"}
    assert load_volume(hospital, series=chosen).modality in ("CT", "MR")


def test_workers_find_what_one_process_finds(hospital, monkeypatch) -> None:
    alone = collect(hospital, 1, DEFAULT_LIMITS)
    monkeypatch.setattr(collect_lib, "_MIN_FILES_PER_WORKER", 10)
    monkeypatch.setattr(collect_lib, "_FILES_PER_BATCH", 3)
    shared = collect(hospital, 2, DEFAULT_LIMITS)
    assert (shared.paths, shared.files, shared.series) == (alone.paths, alone.files, alone.series)


def test_object_stores(hospital, tmp_path) -> None:
    def local(path):
        return str(path).replace("gs://bucket", str(hospital))

    def walked(function, path, **kwargs):
        for folder, folders, names in os.walk(local(path)):
            yield folder.replace(str(hospital), "bucket"), folders, names  # as fsspec returns it

    def one(function, path, *args, **kwargs):
        return function(local(path), *args, **kwargs)

    mocks = dict.fromkeys(("open", "exists", "isdir", "listdir", "stat"), one)
    with testing.mock_epath(walk=walked, **mocks):
        remote = collect("gs://bucket", 4, DEFAULT_LIMITS)
        with pytest.raises(UserError, match="nothing in it"):
            collect("gs://bucket/none", 4, DEFAULT_LIMITS)
    at_home = collect(hospital, 1, DEFAULT_LIMITS)
    assert len(remote.files) == len(at_home.files)
    assert {s.id: (s.use, s.problem) for s in remote.series} == {
        s.id: (s.use, s.problem) for s in at_home.series
    }


@pytest.mark.parametrize(
    ("folder", "arguments", "reason"),
    [
        ("none", [], "no such folder"),
        ("file", [], "is a file"),
        ("a\0b", [], "cannot be listed"),
        (".", ["--workers", "-1"], "--workers"),
        (".", ["--json", "file/x.json"], "cannot be written"),
    ],
)
def test_bad_calls_end_with_2(tmp_path, monkeypatch, capsys, folder: str, arguments, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["data", "scan", folder, *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_an_empty_folder_is_no_error(tmp_path, capsys) -> None:
    (tmp_path / "in").mkdir()
    result, text = scan(tmp_path / "in", tmp_path, capsys)
    assert result["summary"]["files"] == 0 and "no readable images" in text


def test_a_killed_worker_is_said(tmp_path, monkeypatch) -> None:
    stack(tmp_path, "1", 4)
    monkeypatch.setattr(collect_lib, "_MIN_FILES_PER_WORKER", 1)
    monkeypatch.setattr(collect_lib, "_ordered_map", killed)
    with pytest.raises(UserError, match="scan worker was killed"):
        collect(tmp_path, 2, DEFAULT_LIMITS)


def killed(executor, function, batches, limits):
    yield executor.submit(os._exit, 1).result()


def test_interrupt_ends_all_processes_without_a_traceback(hospital) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        from vilam3_jax import cli
        from vilam3_jax.data.scan import collect

        if __name__ == "__main__":
            collect._MIN_FILES_PER_WORKER, collect._FILES_PER_BATCH = 10, 2
            ordered = collect._ordered_map
            def interrupted(*arguments):
                for number, result in enumerate(ordered(*arguments)):
                    if number == 1:
                        os.killpg(0, signal.SIGINT)
                    yield result
            collect._ordered_map = interrupted
            sys.exit(cli.main(["data", "scan", {str(hospital)!r}, "--workers", "2"]))
        """
    )
    program = hospital.parent / "program.py"
    program.write_text(script)
    with subprocess.Popen(
        [sys.executable, str(program)], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        error = process.communicate(timeout=120)[1]
    assert process.returncode == cli.INTERRUPTED, error
    assert "interrupted" in error and "Traceback" not in error
    with pytest.raises(ProcessLookupError):  # no process of the group remains after a moment
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
