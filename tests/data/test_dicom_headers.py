"""DICOM headers: recognition by content, equal results of both parsers, bounds, no patient data."""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

from vilam3_jax.data import dicom
from vilam3_jax.data.dicom import header_walk, headers
from vilam3_jax.data.dicom.headers import (
    functional_group,
    is_directory,
    read_dataset,
    read_header,
    wrap_dicom_errors,
)
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UnavailableError, UserError

SYNTAXES = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
]
SECRETS = ("DOE^JANE", "19550101", "HOSPITAL", "SECRET")
# Real files in every encoding, including RLE, JPEG and text objects.
REAL = [
    "CT_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "image_dfl.dcm",
    "emri_small.dcm",
    "eCT_Supplemental.dcm",
    "reportsi.dcm",
    "rtplan.dcm",
    "SC_rgb_rle.dcm",
    "examples_ybr_color.dcm",
    "explicit_VR-UN.dcm",
    "no_meta_group_length.dcm",
    "ExplVR_BigEndNoMeta.dcm",
]


def real(name):
    return get_testdata_file(name, download=False)


def image(syntax=ExplicitVRLittleEndian, **tags):
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = syntax
    d.file_meta.SourceApplicationEntityTitle = "HOSPITAL"
    d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID = CTImageStorage, generate_uid(), generate_uid()
    d.PatientName, d.PatientBirthDate, d.InstitutionName = "DOE^JANE", "19550101", "HOSPITAL"
    d.SeriesDescription = "SECRET"
    d.add_new(0x00111001, "LO", "SECRET")
    d.Modality, d.PhotometricInterpretation, d.SamplesPerPixel = "CT", "MONOCHROME2", 1
    d.Rows, d.Columns, d.BitsAllocated, d.BitsStored, d.HighBit = 2, 2, 8, 8, 7
    d.PixelRepresentation, d.PixelData = 0, b"\1\2\3\4"
    d["PixelData"].VR = "OB"
    for key, value in tags.items():
        setattr(d, key, value)
    return d


def written(d, *, bare=False):
    """The bytes of a file; `bare`: without preamble and meta information, as in old archives."""
    buffer = io.BytesIO()
    if bare:
        syntax = d.file_meta.TransferSyntaxUID
        del d.file_meta
        d.save_as(buffer, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    else:
        d.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_recognised_by_content_in_every_encoding(tmp_path, syntax, bare):
    path = tmp_path / "IM000001"
    path.write_bytes(written(image(syntax), bare=bare))
    header = read_header(path)
    assert header is not None
    assert (header.Rows, header.Modality) == (2, "CT") and "PixelData" not in header
    assert read_dataset(path).PixelData == b"\1\2\3\4"


def test_deflated(tmp_path):
    path = tmp_path / "deflated"
    path.write_bytes(written(image(DeflatedExplicitVRLittleEndian)))
    header = read_header(path)
    assert header is not None and header.Rows == 2
    assert header.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    assert read_dataset(path).PixelData == b"\1\2\3\4"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08\x00",
        b"hello" * 100,
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        bytes(1000),
        b"\x08\x00\x08\x00" + bytes(200),  # group 8 without a second element
        b"\x08\x00\x08\x00CS\xff\xff" + bytes(200),
        struct.pack("<5l", 348, 0, 0, 0, 0) + bytes(400),  # NIfTI
        b"DICM" + bytes(200),
    ],
)
def test_other_files_are_none(tmp_path, data):
    (tmp_path / "x.dcm").write_bytes(data)
    assert read_header(tmp_path / "x.dcm") is None
    with pytest.raises(UserError, match=r"x\.dcm: not a DICOM file"):
        read_dataset(tmp_path / "x.dcm")


def test_dicomdir_is_told_from_images():
    for name in ("DICOMDIR", "DICOMDIR-bigEnd", "DICOMDIR-implicit"):
        header = read_header(real(f"dicomdirtests/{name}") or real(name))
        assert header is not None and is_directory(header)
    header = read_header(real("CT_small.dcm"))
    assert header is not None and not is_directory(header)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_no_patient_data_is_read(tmp_path, syntax):
    def nested():
        item = Dataset()
        item.PatientName, item.CodeMeaning, item.CodeValue = "DOE^JANE", "SECRET", "T-1"
        return Sequence([item])

    group = Dataset()
    group.FrameContentSequence = nested()
    group.FrameContentSequence[0].FrameComments = "SECRET"
    d = image(syntax, AnatomicRegionSequence=nested(), RequestAttributesSequence=nested())
    d.PerFrameFunctionalGroupsSequence = Sequence([group])
    path = tmp_path / "a.dcm"
    path.write_bytes(written(d))
    for found in (read_header(path), read_dataset(path)):
        assert found is not None
        text = str(found) + str(found.file_meta)
        assert "T-1" in text and not any(secret in text for secret in SECRETS)


def test_functional_groups_are_read(tmp_path):
    def group(keyword, **tags):
        item, macro = Dataset(), Dataset()
        macro.update(tags)
        setattr(item, keyword, [macro])
        return item

    own = [group("PlanePositionSequence", ImagePositionPatient=[0, 0, z]) for z in (5, 7)]
    d = image(NumberOfFrames=2, PerFrameFunctionalGroupsSequence=own)
    d.SharedFunctionalGroupsSequence = [group("PixelMeasuresSequence", PixelSpacing=[0.5, 0.25])]
    path = tmp_path / "enhanced.dcm"
    for undefined in (False, True):
        d["PerFrameFunctionalGroupsSequence"].is_undefined_length = undefined
        path.write_bytes(written(d))
        full = read_header(path)
        assert full is not None and len(full.PerFrameFunctionalGroupsSequence) == 2
        for frame, z in ((0, 5), (1, 7)):
            found = functional_group(full, frame, "PlanePositionSequence")
            assert found is not None and found.ImagePositionPatient == [0, 0, z]
        shared = functional_group(full, 1, "PixelMeasuresSequence")
        assert shared is not None and shared.PixelSpacing == [0.5, 0.25]
        assert functional_group(full, 2, "PlanePositionSequence") is None


def as_text(header):
    if header is None:
        return None
    values = {tag: (header[tag].VR, str(header[tag].value)) for tag in list(header.keys())}
    return values, str(header.file_meta), header.original_encoding, header.original_character_set


def both_ways(path, monkeypatch):
    results = []
    for walk in (header_walk.walk, lambda *args: None):
        with monkeypatch.context() as patched:
            patched.setattr(header_walk, "walk", walk)
            try:
                with wrap_dicom_errors(path):  # values are decoded on access
                    results.append(as_text(read_header(path)))
            except UserError as error:
                results.append(str(error))
    return results


@pytest.mark.parametrize("name", REAL)
def test_both_ways_of_reading_agree(monkeypatch, name):
    fast, slow = both_ways(real(name), monkeypatch)
    assert fast == slow


def test_ordinary_files_take_the_fast_way():
    for name in ("CT_small.dcm", "MR_small_implicit.dcm", "SC_rgb_rle.dcm"):
        with open(real(name), "rb") as file:
            assert header_walk.walk(file, frozenset()) is not None


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")
@settings(max_examples=120, deadline=None)
@given(
    which=st.integers(0, 3),
    undefined=st.booleans(),
    keep=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damaged_headers_read_alike_or_end_in_one_line(tmp_path_factory, which, undefined, keep, changes):
    inner = Dataset()
    inner.CodeValue = "T-1"
    d = image(SYNTAXES[which], RequestAttributesSequence=Sequence([inner]))
    d["RequestAttributesSequence"].is_undefined_length = undefined
    raw = bytearray(written(d))
    for place, value in changes:
        raw[int(place * len(raw))] = value
    path = tmp_path_factory.mktemp("damage") / "d.dcm"
    path.write_bytes(raw if changes else raw[: int(keep * len(raw))])
    with pytest.MonkeyPatch.context() as monkeypatch:
        fast, slow = both_ways(path, monkeypatch)
    if not isinstance(slow, str):  # pydicom also rejects damage inside elements that the walk skips
        assert fast == slow
    if isinstance(fast, str):
        assert "d.dcm" in fast and "\n" not in fast


def test_a_class_with_an_unknown_value_representation_is_no_directory(tmp_path):
    raw = written(image(SYNTAXES[0])).replace(b"\x02\0\x02\0UI", b"\x02\0\x02\0\x0fI", 1)
    path = tmp_path / "d.dcm"
    path.write_bytes(raw)
    # pydicom decodes lazily and would raise its own error later.
    with pytest.raises(UserError, match=r"d\.dcm: DICOM without any image element"):
        dicom.survey(path)


# ---- bounds


def test_deflated_bombs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "_MAX_BYTES", 64 << 20)
    raw = written(image(DeflatedExplicitVRLittleEndian))
    start = 144 + struct.unpack_from("<L", raw, 140)[0]
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    element = struct.pack("<HH2sHL", 0x0009, 0x1002, b"OB", 0, 200 << 20)
    bomb = compressor.compress(element) + compressor.compress(bytes(200 << 20)) + compressor.flush()
    path = tmp_path / "bomb.dcm"
    path.write_bytes(raw[:start] + bomb)
    with pytest.raises(UserError, match=r"bomb\.dcm: ends inside an element"):
        read_header(path)
    with pytest.raises(UserError, match=r"bomb\.dcm: ends inside an element"):
        read_dataset(path, limits=Limits(decoded_bytes=1 << 20))


def test_deep_nesting_is_refused(tmp_path):
    def nested(depth, keyword):
        item = Dataset()
        item.CodeValue = "1"
        for _ in range(depth):
            outer = Dataset()
            setattr(outer, keyword, Sequence([item]))
            item = outer
        return item

    path = tmp_path / "deep.dcm"
    deep = nested(20, "AnatomicRegionSequence")
    path.write_bytes(written(image(AnatomicRegionSequence=deep.AnatomicRegionSequence)))
    with pytest.raises(UserError, match=r"deep\.dcm: .*nested too deeply"):
        read_header(path)
    opener = struct.pack("<HH2sHLHHL", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    raw = written(image())
    path.write_bytes(raw[: raw.index(b"\x28\x00\x02\x00")] + opener * 5000)
    with pytest.raises(UserError, match=r"deep\.dcm: "):
        read_header(path)


def test_a_flood_of_elements_ends_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "_MAX_READS", 300_000)
    raw = written(image())
    empty = struct.pack("<HH2sH", 0x0009, 0x0010, b"LO", 0)
    path = tmp_path / "flood.dcm"
    path.write_bytes(raw[: raw.index(b"\x28\x00\x02\x00")] + empty * 400_000)
    with pytest.raises(UserError, match=r"flood\.dcm: .*too many elements in the header"):
        read_header(path)


def test_long_values_are_refused(tmp_path):
    path = tmp_path / "long.dcm"
    raw = written(image(ImplicitVRLittleEndian))
    place = raw.index(struct.pack("<HHL", 0x0028, 0x0002, 2))
    numbers = b"1\\" * 100_000
    path.write_bytes(raw[:place] + struct.pack("<HHL", 0x0018, 0x1065, len(numbers)) + numbers + raw[place:])
    with pytest.raises(UserError, match=r"long\.dcm: .*an element of 200000 bytes"):
        read_header(path)


def test_truncated_files_are_told(tmp_path):
    raw = written(image())
    path = tmp_path / "cut.dcm"
    path.write_bytes(raw[:-2])
    assert read_header(path) is not None  # the header is complete
    with pytest.raises(UserError, match=r"cut\.dcm: ends inside an element; the file is cut short"):
        read_dataset(path)
    path.write_bytes(raw[: raw.index(b"MONOCHROME2") + 3])
    with pytest.raises(UserError, match=r"cut\.dcm: ends inside an element; the file is cut short"):
        read_header(path)
    with pytest.raises(UserError, match="cut short"):  # in the middle of compressed pixels
        read_dataset(real("emri_small_jpeg_2k_lossless_too_short.dcm"))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.dcm: no such file"):
        read_header(tmp_path / "none.dcm")
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path)


# ---- error messages


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\nlines"), "damaged DICOM data (two lines)"),
        (TypeError("bad <object at 0x7f00aa11>"), "damaged DICOM data (bad <object>)"),
        (RecursionError(), "nested too deeply"),
        (MemoryError(), "more memory needed than available"),
        (EOFError(), "cut short"),
        (struct.error("x"), "damaged DICOM data (x)"),
        (KeyError(), "damaged DICOM data (KeyError)"),
    ],
)
def test_damage_of_any_kind_is_one_line(error, text):
    with pytest.raises(UserError) as refused, wrap_dicom_errors("f.dcm"):
        raise error
    assert text in str(refused.value) and str(refused.value).startswith("f.dcm: ")
    assert "\n" not in str(refused.value) and not isinstance(refused.value, UnavailableError)


def test_failing_disks_are_told_from_damage():
    with pytest.raises(UnavailableError, match=r"f\.dcm"), wrap_dicom_errors("f.dcm"):
        raise OSError(5, "Input/output error")


def test_nothing_that_pydicom_says_of_a_patient_reaches_a_log(tmp_path, caplog):
    path = tmp_path / "p.dcm"
    raw = written(image(SequenceName="ABCDEFGH"))
    path.write_bytes(raw.replace(b"ABCDEFGH", b"DOE^\xff\x01NE"))
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        header = read_header(path)
        assert header is not None
        with wrap_dicom_errors(path):
            str(header)
    assert caplog.text == ""
