"""Identification of files by content, tested on files of other programs."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import imagecodecs
import nibabel as nib
import nibabel.testing
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from vilam3_jax.data import file_kinds
from vilam3_jax.data.file_kinds import identify, identify_bytes, refusal
from vilam3_jax.errors import UserError

VOLUME = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
NIFTI = VOLUME.to_bytes()
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)


def picture(form: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(**options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, PIXELS, photometric="rgb", **options)
    return buffer.getvalue()


def saved(write, *arguments, **options) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *arguments, **options)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("scan/1.dcm"))
    return buffer.getvalue()


def bare_dicom(implicit: bool, little: bool) -> bytes:
    """A data set without preamble and meta information, as in archives of the 1990s."""
    dataset = Dataset()
    dataset.Modality, dataset.Rows, dataset.Columns, dataset.BitsAllocated = "CR", 2, 2, 16
    return saved(lambda file: dataset.save_as(file, implicit_vr=implicit, little_endian=little))


READ = [
    ("dicom", "DICOM file", Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()),
    ("dicom", "DICOM file without preamble", bare_dicom(True, True)),
    ("dicom", "DICOM file without preamble", bare_dicom(False, True)),
    ("dicom", "DICOM file without preamble", bare_dicom(False, False)),
    ("dicom", "DICOMDIR", Path(str(get_testdata_file("DICOMDIR"))).read_bytes()),
    ("dicom", "DICOM file", b"II*\0" + bytes(124) + b"DICM"),  # also a TIFF
    ("nifti", "NIfTI volume", NIFTI),
    ("nifti", "NIfTI volume", gzip.compress(NIFTI, mtime=0)),
    ("nifti", "NIfTI volume", gzip.compress(NIFTI[:300], mtime=0) + gzip.compress(NIFTI[300:], mtime=0)),
    (
        "nifti",
        "NIfTI volume",
        nib.Nifti1Image(VOLUME.dataobj, None, VOLUME.header.as_byteswapped()).to_bytes(),
    ),
    ("nifti", "NIfTI volume", nib.Nifti2Image(VOLUME.dataobj, np.eye(4)).to_bytes()),
    ("nifti pair", "NIfTI pair", NIFTI[:344] + b"ni1\0"),
    ("nrrd", "NRRD volume", b"NRRD0004\ntype: short\ndimension: 3\nsizes: 1 1 1\nencoding: raw\n\n\0\0"),
    ("nrrd", "NRRD header with its data", b"NRRD0005\ntype: short\ndata file: scan.raw\nencoding: raw\n"),
    (
        "metaimage",
        "MetaImage",
        b"ObjectType = Image\nNDims = 3\nDimSize = 1 1 1\nElementDataFile = LOCAL\n\0\xff",
    ),
    ("metaimage", "MetaImage", b"NDims = 3\r\nDimSize = 1 1 1\r\nElementDataFile = a.raw\r\n"),
    *(("image", f"{name} image", picture(name)) for name in ("PNG", "JPEG", "BMP", "GIF", "TIFF")),
    ("image", "WebP image", picture("WEBP")),
    ("image", "TIFF image", tiff(bigtiff=True)),
    ("image", "TIFF image", tiff(byteorder=">")),
    ("image", "JPEG image", picture("MPO")),
]


@pytest.mark.parametrize(("reader", "name", "data"), READ)
def test_what_is_read_is_told_by_its_content(tmp_path, reader, name, data):
    for suffix in ("", ".dcm", ".png", ".nii.gz", ".TXT", ".mha"):  # a wrong suffix changes nothing
        path = tmp_path / f"file{suffix}"
        path.write_bytes(data)
        kind = identify(path)
        assert kind.reader == reader and kind.name.startswith(name), suffix
        assert kind == identify_bytes(data, path.name) and not kind.advice


NOT_READ = [
    ("", b"", "empty file"),
    ("a.img", bytes(5000), "zero bytes"),
    ("", b"DICM" + bytes(40), "lost its preamble"),
    ("", NIFTI[:344] + bytes(4), "Analyze 7.5"),
    ("", imagecodecs.jpeg2k_encode(PIXELS), "JPEG 2000"),
    ("", imagecodecs.jpegxl_encode(PIXELS), "JPEG XL"),
    ("", imagecodecs.jpegls_encode(PIXELS[..., 0]), "JPEG-LS"),
    ("", imagecodecs.avif_encode(PIXELS), "AVIF"),
    ("", b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
    ("", b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(100), "HEIC"),
    ("", b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafxxxx" + bytes(100), "HEIF"),
    ("", b"\0\0\0\x18ftypcrx " + bytes(100), "Canon raw"),
    ("", imagecodecs.qoi_encode(PIXELS), "QOI"),
    ("", b"8BPS\0\x01" + bytes(20), "Photoshop"),
    ("", b"\x76\x2f\x31\x01" + bytes(20), "OpenEXR"),
    ("", picture("PPM"), "PNM"),
    ("", picture("ICNS"), "Apple icon"),
    ("a.svs", tiff(), "whole-slide"),
    ("", tiff(description="Aperio Image Library v10"), "whole-slide"),
    ("a.dng", tiff(), "raw photo"),
    ("", picture("PDF"), "PDF"),
    ("", picture("EPS"), "PostScript"),
    ("", b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "SVG"),
    ("", b"\0\0\0\x18ftypisom" + bytes(20), "video"),
    ("", b"RIFF\0\0\0\0AVI LIST", "AVI video"),
    ("", b"\x1a\x45\xdf\xa3" + bytes(20), "Matroska"),
    ("", saved(np.save, np.zeros(3)), "npy"),
    ("", saved(np.savez, a=np.zeros(3)), "npz"),
    ("", zipped("1.dcm"), "zip"),
    ("", zipped("[Content_Types].xml"), "Microsoft Office"),
    ("", zipped("archive/data.pkl"), "PyTorch"),
    ("", zipped("1.dcm")[:6] + b"\x01" + zipped("1.dcm")[7:], "encrypted zip"),
    ("", b"7z\xbc\xaf\x27\x1c" + bytes(20), "7z"),
    ("", b"Rar!\x1a\x07\x01\0", "RAR"),
    ("", tarred(), "tar archive"),
    ("", gzip.compress(tarred(), mtime=0), "tar.gz"),
    ("", gzip.compress(READ[0][2], mtime=0), "gzip-compressed file with a DICOM file inside"),
    ("", gzip.compress(b"", mtime=0), "gzip file with nothing inside"),
    ("a.nii.gz", gzip.compress(gzip.compress(NIFTI, mtime=0), mtime=0), "compressed twice with gzip"),
    ("a.nii.gz", gzip.compress(b"<!DOCTYPE html><html>", mtime=0), "gzip-compressed web page"),
    ("a.nii.gz", gzip.compress(b"\x07\x03" * 500, mtime=0), "named .nii without NIfTI"),
    ("a.nii.gz", gzip.compress(bytes(500), mtime=0), "gzip-compressed file of zero bytes"),
    ("", gzip.compress(b"mrtrix image\ndim: 3,3,3\n", mtime=0), "MRtrix"),
    ("a.nii.gz", gzip.compress(NIFTI, mtime=0)[:8], "damaged gzip|nothing inside|gzip"),
    ("", bz2.compress(NIFTI), "bzip2"),
    ("", lzma.compress(NIFTI), "xz"),
    ("", imagecodecs.zstd_encode(NIFTI), "Zstandard"),
    ("", b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5"),
    ("a.mnc", b"\x89HDF\r\n\x1a\n" + bytes(20), "MINC 2"),
    ("", b"MATLAB 5.0 MAT-file, Platform: GLNXA64", "MATLAB"),
    ("a.mgz", gzip.compress(b"\0\0\0\x01" + bytes(280), mtime=0), "FreeSurfer"),
    ("", b"!INTERFILE :=\n", "Interfile"),
    ("", b"# vtk DataFile Version 3.0\n", "VTK"),
    ("", b'<VTKFile type="ImageData">', "VTK"),
    ("", b"solid part\nfacet normal 0 0 1\n", "mesh"),
    ("a.stl", bytes(80) + b"\x01\0\0\0" + bytes(range(50)), "mesh"),
    ("", b'{"a": 1}', "JSON text"),
    ("", b"[1, 2]", "JSON text"),
    ("", b'[{"00080060": {"vr": "CS", "Value": ["CT"]}}]', "DICOM data as JSON"),
    ("a.png", base64.b64encode(picture("PNG")), "base64"),
    ("a.png", b"data:image/png;base64," + base64.b64encode(picture("PNG")), "base64"),
    ("a.nii.gz", b"../../.git/annex/objects/Xx/Yy/MD5E-s9--0.nii.gz\n", "git-annex pointer"),
    ("", b"-----BEGIN PGP MESSAGE-----\n", "encrypted"),
    ("", b"mrtrix image\ndim: 3,3,3\n", "MRtrix"),
    ("", b"mrtrix tracks\ncount: 0\n", "tractogram"),
    ("", b"TRACK\0" + bytes(994), "tractogram"),
    ("", picture("ICO"), "Windows icon"),
    ("", b"#?RGBE\nFORMAT=32-bit_rle_rgbe\n\n", "Radiance"),
    ("", b"\n\n%PDF-1.4\n", "PDF"),
    ("", b"<head><title>403</title></head>", "web page"),
    ("a.csv", b"id,age\n1,2\n", "CSV"),
    ("", "Größe; Länge\n".encode("cp1252"), "text file"),
    ("", "Größe".encode("utf-16"), "text file"),
    ("", ("ä" * 5000).encode()[:4095], "text file"),
    ("scan.dcm", b"<!DOCTYPE html>\n<html>404", "web page"),
    ("scan.dcm", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "object store"),
    ("scan.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
    ("", b"\x80\x04\x95\x10\0\0\0", "pickle"),
    ("", b"GGUF\x03\0\0\0", "checkpoint"),
    ("", b"\x10\0\0\0\0\0\0\0" + b'{"x":{"dtype":1}}', "checkpoint"),
    ("", b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "macOS"),
    ("", bytes(0x8001) + b"CD001" + bytes(100), "disc image"),
    ("a.img", b"\x07\x03" * 500, "without a usable .hdr"),
    ("a.raw", b"\x07\x03" * 500, "raw numbers"),
    ("a.dcm", b"\x07\x03" * 500, "named .dcm without DICOM"),
    ("A.NII.GZ", b"\x07\x03" * 500, "named .nii without NIfTI"),
    ("a", b"\x07\x03" * 500, "unknown kind"),
]


@pytest.mark.parametrize(("name", "data", "words"), NOT_READ)
def test_what_is_not_read_is_named_with_what_to_do(tmp_path, name, data, words):
    path = tmp_path / (name or "file")
    path.write_bytes(data)
    kind = identify(path)
    assert kind.reader is None and kind.advice
    error = str(refusal(path, kind))
    assert any(word in error for word in words.split("|")), error
    assert error == f"{path}: {kind.name}; {kind.advice}" and "\n" not in error and " 0x" not in error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("minc1_1_scale.mnc", "MINC 1"),
        ("minc2_1_scale.mnc", "MINC 2"),
        ("test.mgz", "FreeSurfer"),
        ("tinypet.v", "ECAT"),
        ("phantom_EPI_asc_CLEAR_2_1.PAR", "PAR/REC"),
        ("phantom_EPI_asc_CLEAR_2_1.REC", "PAR/REC"),
        ("example4d+orig.HEAD", "AFNI"),
        ("analyze.hdr", "Analyze"),
        ("example4d.nii.gz", "NIfTI volume"),
        ("nifti1.hdr", "NIfTI pair"),
        ("nifti2.hdr", "NIfTI pair"),
    ],
)
def test_files_of_nibabels_own_tests(name, words):
    path = Path(nibabel.testing.data_path) / name
    if not path.exists():
        path = Path(nibabel.__file__).parent / "nicom" / "tests" / "data" / name
    assert words in identify(path).name


def test_every_dicom_file_of_pydicom_is_recognised():
    folder = Path(str(get_testdata_file("CT_small.dcm"))).parent
    kinds = {path.name: identify(path).reader for path in folder.glob("*.dcm")}
    assert len(kinds) > 50
    # no_meta.dcm lacks its first bytes.
    assert {name for name, reader in kinds.items() if reader != "dicom"} <= {"no_meta.dcm"}


def test_the_img_of_a_pair_is_known_by_its_header(tmp_path):
    nib.save(nib.Nifti1Pair(VOLUME.dataobj, np.eye(4)), tmp_path / "a.img")
    assert identify(tmp_path / "a.img") is file_kinds.NIFTI_PAIR  # its own bytes are zeros
    nib.save(nib.AnalyzeImage(VOLUME.dataobj, np.eye(4)), tmp_path / "b.img")
    assert identify(tmp_path / "b.img") is file_kinds.ANALYZE
    (tmp_path / "c.hdr").write_text("ENVI\n")
    (tmp_path / "c.img").write_bytes(b"\x07\x03" * 500)
    assert "without a usable .hdr" in identify(tmp_path / "c.img").name


def test_folders_and_absent_files(tmp_path):
    assert identify(tmp_path) is file_kinds.FOLDER
    with pytest.raises(UserError, match="no such file"):
        identify(tmp_path / "absent")


def test_an_image_for_a_scan_and_the_other_way_round():
    assert str(refusal("x", file_kinds.PNG)) == (
        "x: PNG image, not a scan; give a NIfTI, NRRD, MetaImage or DICOM file"
    )
    assert str(refusal("x", file_kinds.NIFTI)) == "x: NIfTI volume, not an image; open it as a scan"


def test_sqlite_and_json_lines(tmp_path):
    with sqlite3.connect(tmp_path / "x.dcm") as database:
        database.execute("create table t (a)")
    assert "SQLite" in identify(tmp_path / "x.dcm").name
    assert "JSON" in identify_bytes(json.dumps([{"a": 1}]).encode(), "x.json").name


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_have_a_kind(data):
    seed = data.draw(st.sampled_from([seed for _, _, seed in READ] + [seed for _, seed, _ in NOT_READ]))
    start = bytearray(seed[: data.draw(st.integers(0, 700))])
    for _ in range(data.draw(st.integers(0, 4))):
        if start:
            start[data.draw(st.integers(0, len(start) - 1))] = data.draw(st.integers(0, 255))
    name = data.draw(st.sampled_from(["", "a.img", "x.nii.gz", "y.mgz", "z.obj", "IM0001"]))
    kind = identify_bytes(bytes(start), name)
    assert kind.name and (kind.reader is not None or kind.advice)
    assert "\n" not in kind.name + kind.advice


def test_a_gzip_bomb_is_only_peeked_into():
    assert "gzip" in identify_bytes(gzip.compress(bytes(50 << 20), 9)[: 1 << 16], "x").name
