"""`vilam3 data deidentify`: planted identifiers do not come through, and images stay the same."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import struct
import zlib
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime
from importlib import resources
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pydicom.config
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file
from pydicom.datadict import DicomDictionary, dictionary_VR, keyword_dict, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    generate_uid,
)

from vilam3_jax.data.deidentify import burned_in, deidentify, profile, run
from vilam3_jax.data.deidentify.main import main
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import UserError

MARK = "ZQXV"  # stands in every planted text
UID_MARK = "1.2.826.0.1.9731640"  # root of every planted UID
DATE = "19470811"
SALT = b"a salt of the tests, long enough"


def mark(tag):
    return f"{MARK}{int(tag):08X}"


def picture(rows=16, columns=18, dtype=np.uint16):
    """A smooth ramp, so that no mark can be in it."""
    return (np.add.outer(np.arange(rows), np.arange(columns)) * 3).astype(dtype)


def image(pixels=None, *, sop_class=CTImageStorage, modality="CT", patient="12345", **more):
    pixels = picture() if pixels is None else pixels
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID, d.Modality = sop_class, modality
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(d, keyword, f"{UID_MARK}.{generate_uid()[-20:].lstrip('0.').replace('.', '')}")
    d.PatientID, d.PatientName = patient, f"{MARK}^NAME"
    d.StudyDate, d.StudyTime, d.InstanceNumber = DATE, "101112", 1
    d.Rows, d.Columns = pixels.shape[:2]
    d.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    d.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        d.PlanarConfiguration = 0
    d.BitsAllocated = d.BitsStored = 8 * pixels.itemsize
    d.HighBit, d.PixelRepresentation = d.BitsStored - 1, 0
    d.PixelData = pixels.tobytes()
    for keyword, value in more.items():
        setattr(d, keyword, value)
    return d


def stored(dataset, path=None, *, preamble=bytes(128)):
    """The file of a data set, whose values may be anything."""
    syntax = dataset.file_meta.TransferSyntaxUID
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", CTImageStorage)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", f"{UID_MARK}.1")
    dataset.preamble = preamble
    buffer = io.BytesIO()
    with pydicom.config.disable_value_validation():
        if syntax.is_encapsulated:
            dataset["PixelData"].VR = "OB"
        elif "PixelData" in dataset:
            dataset["PixelData"].VR = "OW"
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def options(tmp_path, **more):
    values = {"keep_characteristics": False, "refuse_suspects": False, "limits": DEFAULT_LIMITS, **more}
    return run.Options(str(tmp_path / "out"), SALT, **values)


def cleaned(data, tmp_path, **more):
    """The bytes of the copy, and its `Outcome`."""
    path = tmp_path / "one.dcm"
    path.write_bytes(data)
    outcome = run.clean_file(str(path), options(tmp_path, **more))
    assert outcome.output, outcome.reason
    return (tmp_path / "out" / outcome.output).read_bytes(), outcome


def reread(data):
    return pydicom.dcmread(io.BytesIO(data))


def assert_no_mark(data):
    for text in (MARK, UID_MARK, DATE):
        for coded in (text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be")):
            assert coded not in data, text


# ---- planted identifiers ----

TEXTS = {"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UR", "UT"}
BYTES = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}
NEEDED = {
    "SOPClassUID",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelData",
    "PixelRepresentation",
    "NumberOfFrames",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "PlanarConfiguration",
    "PatientID",
    "SpecificCharacterSet",
}


def planted(syntax):
    """Marks in every attribute of pydicom's dictionary, in every VR; returns their numbers too."""
    d = image()
    d.file_meta.TransferSyntaxUID = syntax
    numbers, deep = [], nested(2)  # with the data set, marks in three levels below
    with pydicom.config.disable_value_validation():
        for tag, (vrs, _, _, _, keyword) in DicomDictionary.items():
            if keyword in NEEDED or tag >> 16 < 8 or tag & 0xFFFF == 0:
                continue
            vr = vrs.split(" or ")[0]
            if vr == "SQ":
                is_allowed = tag in profile.allow_list().kinds
                d.add_new(tag, "SQ", [deep if is_allowed else shallow()])
            elif vr == "UI":
                d.add_new(tag, vr, f"{UID_MARK}.{tag}")
            elif vr in TEXTS:
                d.add_new(tag, vr, mark(tag)[: 4 if vr == "AS" else None])
            elif vr in BYTES:
                d.add_new(tag, vr, mark(tag).encode() + mark(tag).encode("utf-16-le"))
            elif vr in ("DS", "IS"):
                # In an implicit file, such an attribute may hold any text.
                d.add_new(tag, "LO" if syntax == ImplicitVRLittleEndian else vr, planted_number(tag, syntax))
            elif tag not in profile.allow_list().kinds and vr in ("UL", "FD", "UV"):
                value = {"UL": 0xA5F00000 + tag % 0xFFFF, "FD": 1e200 + tag * 1e190}.get(
                    vr, (0xA5F << 48) + tag
                )
                d.add_new(tag, vr, value)
                numbers.append(struct.pack({"UL": "I", "FD": "d", "UV": "Q"}[vr], value))
        for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
            setattr(d, keyword, DATE)
        d.AcquisitionDateTime = DATE + "101112"
        for group in range(0x6000, 0x6020, 2):
            for element, vr in ((0x22, "LO"), (0x1500, "LO"), (0x4000, "LT"), (0x3000, "OW")):
                d.add_new(group << 16 | element, vr, mark(group) if vr != "OW" else mark(group).encode())
        for element, vr in ((0x0022, "LO"), (0x2500, "LO"), (0x200C, "OW"), (0x3000, "OW")):
            d.add_new(0x50000000 | element, vr, mark(element) if vr != "OW" else mark(element).encode())
        add_private(d)
        if syntax != ImplicitVRLittleEndian:
            value, tag = unknown_sequence(), Tag(tag_for_keyword("SharedFunctionalGroupsSequence"))
            d[tag] = RawDataElement(tag, "UN", len(value), value, 0, False, True)
    return d, numbers


def planted_number(tag, syntax):
    if syntax == ImplicitVRLittleEndian:
        return mark(tag)
    return "1" if tag in profile.allow_list().kinds else str(700000000 + tag % 1000000)


def nested(depth):
    item = Dataset()
    item.PatientName, item.PatientComments, item.CodeMeaning = (mark(depth),) * 3
    item.PatientID, item.StudyDate, item.AcquisitionDateTime = mark(depth), DATE, DATE
    item.ReferencedSOPInstanceUID, item.CodeValue = f"{UID_MARK}.{depth}", "1234"
    add_private(item)
    if depth:
        item.RequestAttributesSequence = item.PixelMeasuresSequence = [nested(depth - 1)]
        item.AnatomicRegionSequence = [nested(0)]
    return item


def shallow():
    item = Dataset()
    item.PatientComments = MARK
    return item


def add_private(item):
    block = item.private_block(0x0029, f"{MARK} CREATOR", create=True)
    for offset, vr in enumerate(("LO", "UN", "PN", "OB", "UT")):
        block.add_new(offset, vr, mark(offset).encode() if vr in BYTES else mark(offset))
    inner = Dataset()
    inner.PatientName = mark(9)
    block.add_new(9, "SQ", [inner])


def unknown_sequence():
    """A sequence whose VR the writer did not know: implicit VR inside UN (PS3.5, 6.2.2)."""
    whole = Dataset()
    whole.SharedFunctionalGroupsSequence = [nested(1)]
    buffer = io.BytesIO()
    whole.save_as(buffer, implicit_vr=True, little_endian=True)
    return buffer.getvalue()[8:]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_nothing_planted_comes_through(tmp_path, syntax) -> None:
    dataset, numbers = planted(syntax)
    meta = dataset.file_meta
    meta.SourceApplicationEntityTitle = meta.SendingApplicationEntityTitle = mark(2)
    meta.ImplementationVersionName, meta.ImplementationClassUID = mark(3), f"{UID_MARK}.9"
    meta.PrivateInformationCreatorUID, meta.PrivateInformation = f"{UID_MARK}.8", mark(4).encode()
    data = stored(dataset, preamble=(MARK * 32).encode()) + (MARK * 20).encode()
    assert data.count(MARK.encode()) > 3000 and data.count(UID_MARK.encode()) > 100
    copy, outcome = cleaned(data, tmp_path, keep_characteristics=True)
    assert_no_mark(copy)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    assert len(numbers) > 100
    assert not [n for n in numbers if (n if order == "<" else n[::-1]) in copy]
    result = reread(copy)
    assert not [e for e in result.iterall() if e.VR in ("DS", "IS") and "7" in str(e.value)]
    assert copy[:128] == bytes(128) and result.file_meta.TransferSyntaxUID == syntax
    assert "SourceApplicationEntityTitle" not in result.file_meta
    assert not [e for e in result.iterall() if e.tag.is_private or e.tag.group >> 8 in (0x50, 0x60)]
    assert result.PixelData == dataset.PixelData
    assert_no_mark(json.dumps(outcome.actions).encode())
    assert outcome.actions["removed"]["private attributes"] > 6


def test_deflated_files(tmp_path) -> None:
    dataset = image(PatientComments=MARK)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    copy, _ = cleaned(stored(dataset), tmp_path)
    (length,) = struct.unpack_from("<L", copy, 140)
    inflated = zlib.decompress(copy[144 + length :], -zlib.MAX_WBITS)
    assert b"PYDICOM" in copy and b"REMOVED" not in inflated and b"CT" in inflated
    assert_no_mark(inflated)
    limit = Limits(file_bytes=len(stored(dataset)) + 50)  # it inflates to more
    path = tmp_path / "bomb.dcm"
    dataset.PixelData = bytes(100_000)
    path.write_bytes(stored(dataset))
    assert "larger" in run.clean_file(str(path), options(tmp_path, limits=limit)).reason


@functools.cache
def to_damage():
    dataset = image(PatientComments=MARK * 3, StationName=mark(1), KVP="120", BodyPartExamined="HEAD")
    dataset.SourceImageSequence = [nested(1)]
    return stored(dataset)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_leaks_nothing(tmp_path_factory, data) -> None:
    """Marks stay out whatever happens to tags, lengths and VRs, and no exception comes through."""
    whole = bytearray(to_damage())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(132, len(whole) - picture().nbytes - 1))
        whole[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.dcm"
    path.write_bytes(whole[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))])
    outcome = run.clean_file(str(path), options(path.parent))
    assert MARK not in outcome.reason
    if outcome.output:
        copy = (path.parent / "out" / outcome.output).read_bytes()
        pixels = reread(copy).get("PixelData", b"")
        assert_no_mark(copy.replace(bytes(pixels), b"") if MARK.encode() in pixels else copy)


# ---- the profile ----


def table():
    text = resources.files("vilam3_jax.data.deidentify").joinpath("basic_profile.csv").read_text()
    rows = csv.DictReader(
        io.StringIO("".join(x for x in text.splitlines(True) if x[0] != "#")), delimiter=";"
    )
    return {row["keyword"]: (row["tag"], row["action"]) for row in rows}


def test_table_restates_the_standard() -> None:
    rows = table()
    assert len(rows) == 655
    for keyword, (tag, action) in rows.items():
        assert action in ("X", "Z", "D", "U", "X/Z", "X/D", "Z/D", "X/Z/D", "X/Z/U*"), keyword
        if "x" not in tag and keyword in keyword_dict:
            assert int(tag.replace(",", ""), 16) == keyword_dict[keyword]
    known = {  # PS3.15 table E.1-1
        "PatientName": "Z",
        "PatientID": "Z/D",
        "PatientBirthDate": "Z",
        "PatientSex": "Z",
        "PatientAge": "X",
        "PatientAddress": "X",
        "OtherPatientIDs": "X",
        "AccessionNumber": "Z",
        "InstitutionName": "X/Z/D",
        "ReferringPhysicianName": "Z",
        "StudyDescription": "X",
        "SeriesDescription": "X",
        "ProtocolName": "X/D",
        "StudyDate": "Z",
        "AcquisitionDate": "X/Z",
        "DeviceSerialNumber": "X/Z/D",
        "SOPInstanceUID": "U",
        "FrameOfReferenceUID": "U",
        "SourceImageSequence": "X/Z/U*",
        "ContentSequence": "D",
        "EncapsulatedDocument": "D",
        "IconImageSequence": "X",
        "RequestAttributesSequence": "X",
    }
    assert {keyword: rows[keyword][1] for keyword in known} == known


def test_each_row_of_the_profile_is_followed(tmp_path) -> None:
    dataset, _ = planted(ExplicitVRLittleEndian)
    data = stored(dataset)
    source, copy = reread(data), reread(cleaned(data, tmp_path)[0])
    dates = {"StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime"}
    seen = set()
    for keyword, (_, action) in table().items():
        if keyword not in source or keyword in dates:
            continue
        before, after = source[keyword], copy.get_item(keyword) and copy[keyword]
        seen.add(action)
        if action == "X":
            assert after is None, keyword
        elif action == "Z":
            if keyword != "PatientName":  # the profile allows a dummy: it is the pseudonym
                assert after.is_empty, keyword
        elif action == "U":
            assert re.fullmatch(r"2\.25\.\d{1,39}", after.value), keyword
        elif action == "X/Z/U*":
            assert after[0].ReferencedSOPInstanceUID.startswith("2.25."), keyword
        elif action == "X/Z" or after is None:
            assert after.is_empty if after is not None else action.startswith("X/"), keyword
        else:
            assert not after.is_empty and after.value != before.value, keyword
    assert seen == {"X", "Z", "D", "U", "X/Z", "X/D", "Z/D", "X/Z/D", "X/Z/U*"}
    assert copy.PatientName == copy.PatientID != "12345"
    for keyword in dates:
        assert copy[keyword].value[:8] == copy.StudyDate and "1937" <= copy.StudyDate[:4] < "1947"


def test_allow_list_holds_nothing_that_the_profile_removes() -> None:
    """Only dates (option: modified dates), UIDs, and characteristics (an option, too) may be in both."""
    kinds, rows = profile.allow_list().kinds, profile.basic_profile()
    both = {kinds[tag] for tag in kinds.keys() & rows.keys() if rows[tag] != "X/Z/U*"}
    assert both == {profile.DATE, profile.UID, profile.PATIENT}
    of_kind = {profile.WORD: {"CS", "LO", "SH"}, profile.DATE: {"DA", "TM", "DT"}, profile.UID: {"UI"}}
    for tag, kind in kinds.items():
        assert dictionary_VR(tag) in of_kind.get(kind, {dictionary_VR(tag)}), tag
    free_text = {"AE", "LT", "PN", "ST", "UC", "UN", "UR", "UT"}
    assert not [tag for tag in kinds if dictionary_VR(tag) in free_text]


def test_what_was_done_is_stated(tmp_path) -> None:
    for keep, codes in ((False, ["113100", "113107"]), (True, ["113100", "113107", "113108"])):
        copy = reread(cleaned(stored(image()), tmp_path, keep_characteristics=keep)[0])
        assert copy.PatientIdentityRemoved == "YES"
        assert [item.CodeValue for item in copy.DeidentificationMethodCodeSequence] == codes
        assert "PS3.15 2026c" in copy.DeidentificationMethod[1]
        assert copy.LongitudinalTemporalInformationModified == "MODIFIED"


# ---- identifiers and dates ----


def test_uids_stay_consistent_over_files_and_salts(tmp_path) -> None:
    first, second = image(), image()
    second.FrameOfReferenceUID = first.FrameOfReferenceUID
    reference = Dataset()
    reference.ReferencedSOPClassUID = first.SOPClassUID
    reference.ReferencedSOPInstanceUID = first.SOPInstanceUID
    derivation = Dataset()
    derivation.SourceImageSequence = [reference]
    second.ReferencedImageSequence, second.DerivationImageSequence = [reference], [derivation]
    second.PatientID = "another"  # references between patients hold, too
    a, b = (reread(cleaned(stored(d), tmp_path)[0]) for d in (first, second))
    assert a.FrameOfReferenceUID == b.FrameOfReferenceUID != first.FrameOfReferenceUID
    assert a.file_meta.MediaStorageSOPInstanceUID == a.SOPInstanceUID
    for item in (b.ReferencedImageSequence[0], b.DerivationImageSequence[0].SourceImageSequence[0]):
        assert item.ReferencedSOPInstanceUID == a.SOPInstanceUID
        assert item.ReferencedSOPClassUID == CTImageStorage
    assert a.PatientID != b.PatientID and re.fullmatch("P[0-9A-Z]{11}", a.PatientID)
    assert all(uid.is_valid for uid in (a.SOPInstanceUID, a.StudyInstanceUID, a.SeriesInstanceUID))
    other = run.Options(str(tmp_path / "other"), SALT + b"!", False, False, DEFAULT_LIMITS)
    outcome = run.clean_file(str(tmp_path / "one.dcm"), other)
    assert outcome.series != b.SeriesInstanceUID and outcome.patient != b.PatientID


def pet(patient="12345", **more):
    injection = Dataset()
    injection.RadiopharmaceuticalStartTime = "235000"
    injection.RadiopharmaceuticalStartDateTime = "20200228235000.5"
    injection.RadionuclideTotalDose, injection.RadionuclideHalfLife = "370000000", "6586.2"
    isotope = Dataset()
    isotope.CodeValue, isotope.CodingSchemeDesignator, isotope.CodeMeaning = "C-111A1", "SRT", MARK
    injection.RadionuclideCodeSequence = [isotope]
    return image(
        sop_class=PositronEmissionTomographyImageStorage,
        modality="PT",
        patient=patient,
        StudyDate="20200228",
        SeriesDate="20200229",
        SeriesTime="004000.25",
        AcquisitionDate="20200229",
        AcquisitionTime="004500",
        Units="BQML",
        DecayCorrection="START",
        CorrectedImage=["DECY", "ATTN", MARK],
        PatientWeight="71.5",
        PatientSex="F",
        PatientSize="1.7",
        PatientAge="095Y",
        RescaleSlope="0.123456789",
        RadiopharmaceuticalInformationSequence=[injection],
        **more,
    )


def seconds(date, time):
    return datetime.strptime(
        f"{date}{time}", "%Y%m%d%H%M%S.%f" if "." in time else "%Y%m%d%H%M%S"
    ).timestamp()


def test_uptake_values_can_be_computed(tmp_path) -> None:
    source = pet()
    copy = reread(cleaned(stored(source), tmp_path, keep_characteristics=True)[0])
    before, after = (d.RadiopharmaceuticalInformationSequence[0] for d in (source, copy))
    for d, injection in ((source, before), (copy, after)):
        started = injection.RadiopharmaceuticalStartDateTime
        assert seconds(d.SeriesDate, d.SeriesTime) - seconds(started[:8], started[8:]) == 3000 - 0.25
        assert seconds(d.AcquisitionDate, d.AcquisitionTime) - seconds(d.SeriesDate, d.SeriesTime) == 299.75
    assert copy.SeriesDate != source.SeriesDate and after.RadiopharmaceuticalStartTime == "235000"
    assert (after.RadionuclideTotalDose, after.RadionuclideHalfLife) == (370000000, 6586.2)
    assert (copy.PatientWeight, copy.PatientSex, copy.PatientSize) == (71.5, "F", 1.7)
    assert (copy.Units, copy.DecayCorrection, copy.CorrectedImage) == ("BQML", "START", ["DECY", "ATTN"])
    code = after.RadionuclideCodeSequence[0]  # the meaning is the standard's
    assert (code.CodeValue, code.CodeMeaning) == ("C-111A1", "^18^Fluorine")
    assert str(copy.RescaleSlope) == "0.123456789"


def test_shift_is_constant_for_a_patient(tmp_path) -> None:
    def shift(**more):
        source = pet(**more)
        copy = reread(cleaned(stored(source), tmp_path)[0])
        days = {
            (seconds(source[k].value, "000000") - seconds(copy[k].value, "000000")) / 86400
            for k in ("StudyDate", "SeriesDate", "AcquisitionDate")
        }
        assert len(days) == 1
        return days.pop()

    first = shift()
    assert 365 <= first <= 3652
    assert shift(ContentDate="20210101") == first
    assert len({first, *(shift(patient=f"other {n}") for n in range(3))}) == 4


@pytest.mark.parametrize("value", ["20011340", "00010101", "2001-01-01", MARK, "20010101\\20020202", "1.2"])
def test_a_date_that_is_none_is_not_copied(tmp_path, value) -> None:
    copy = reread(cleaned(stored(image(StudyDate=value, AcquisitionDateTime=value)), tmp_path)[0])
    assert copy["StudyDate"].is_empty
    assert copy.AcquisitionDateTime == "19000101000000"  # X/Z/D: a dummy


@pytest.mark.parametrize(
    ("age", "kept"), [("089Y", "089Y"), ("090Y", "090Y"), ("104Y", "090Y"), ("007M", "007M"), (MARK, None)]
)
def test_age_over_89_is_90(tmp_path, age, kept) -> None:
    data = stored(image(PatientAge=age, PatientSex="M"))
    copy = reread(cleaned(data, tmp_path, keep_characteristics=True)[0])
    assert copy.get("PatientAge") == kept and copy.PatientSex == "M"
    copy = reread(cleaned(data, tmp_path)[0])
    assert "PatientAge" not in copy and copy["PatientSex"].is_empty


def test_unknown_patients_are_told_apart_by_study(tmp_path) -> None:
    one, two = (image(patient=patient, modality="MR") for patient in ("", " "))
    a, b = (cleaned(stored(d), tmp_path)[1] for d in (one, two))
    assert a.patient != b.patient and "each study" in a.notes[0]


def test_numbers_that_are_dates_or_accessions_do_not_pass_as_series_numbers(tmp_path) -> None:
    data = stored(image(SeriesNumber="20200229", AcquisitionNumber="1000201"))
    copy = reread(cleaned(data, tmp_path)[0])
    assert copy["SeriesNumber"].is_empty and copy.AcquisitionNumber == 1000201


# ---- images stay the same ----

REAL = [
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "emri_small.dcm",
    "emri_small_jpeg_2k_lossless.dcm",
    "eCT_Supplemental.dcm",
    "examples_palette.dcm",
    "SC_rgb_small_odd_big_endian.dcm",
    "SC_rgb_rle_16bit_2frame.dcm",
    "SC_rgb_dcmtk_+eb+cy+s2.dcm",
    "SC_rgb_jpeg_app14_dcmd.dcm",
    "JPEG2000.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "MR2_J2KI.dcm",
    "GDCMJ2K_TextGBR.dcm",
    "image_dfl.dcm",
    "gdcm-US-ALOKA-16.dcm",  # segmented palette
]
GEOMETRY = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "PhotometricInterpretation",
    "BitsStored",
    "SmallestImagePixelValue",
)


@pytest.mark.parametrize("name", REAL)
def test_real_images_keep_pixels_and_geometry(tmp_path, name) -> None:
    path = get_testdata_file(name)
    assert path
    source = pydicom.dcmread(path)
    data, _ = cleaned(Path(path).read_bytes(), tmp_path)
    copy = reread(data)
    assert copy.file_meta.TransferSyntaxUID == source.file_meta.TransferSyntaxUID
    assert np.array_equal(pixel_array(copy), pixel_array(source))
    assert {k: str(copy.get(k)) for k in GEOMETRY} == {k: str(source.get(k)) for k in GEOMETRY}
    for keyword in source.dir("TableData", "TableDescriptor", "LUTData"):
        assert copy[keyword].value == source[keyword].value
    for sequence in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for before, after in zip(source.get(sequence, []), copy.get(sequence, []), strict=True):
            for group, keyword in (
                ("PlanePositionSequence", "ImagePositionPatient"),
                ("PlaneOrientationSequence", "ImageOrientationPatient"),
                ("PixelMeasuresSequence", "PixelSpacing"),
            ):
                if group in before:
                    assert after[group][0][keyword].value == before[group][0][keyword].value
    named = [
        str(e.value) for e in source.iterall() if e.VR in ("PN", "LO", "SH", "UI", "LT", "ST") and e.value
    ]
    words = {w for v in profile.allow_list().vocabularies.values() for w in v.words}
    for text in named:
        if len(text) > 6 and not text.startswith("1.2.840.10008") and text not in words and "[" not in text:
            known = any(text == i.CodeMeaning for i in copy.iterall() if isinstance(i, Dataset))
            assert text.encode("latin-1", "replace") not in data or known or is_code(source, text), text
    # Type 1 and 2 of the modules that all images have (PS3.3).
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        assert copy[keyword].value
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"):
        assert keyword in copy
    for keyword in ("ReferringPhysicianName", "StudyID", "AccessionNumber", "SeriesNumber", "Manufacturer"):
        assert keyword in copy


def is_code(source, text):
    return any(e.keyword in ("CodeMeaning", "CodeValue") and str(e.value) == text for e in source.iterall())


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


# ---- bytes around the pixels ----


def test_bytes_after_the_last_pixel_are_cut(tmp_path) -> None:
    pixels = picture(15, 17, np.uint8)
    for tail in (b"\0", (MARK * 9).encode() + b"\0"):
        d = image(pixels, PixelData=pixels.tobytes() + tail)
        copy, outcome = cleaned(stored(d), tmp_path)
        assert_no_mark(copy)
        assert np.array_equal(pixel_array(reread(copy)), pixels)
        assert bool(outcome.notes) == (len(tail) > 1)


def test_overlay_graphics_in_unused_bits_are_removed(tmp_path) -> None:
    pixels, graphics = picture(), np.zeros((16, 18), np.uint16)
    graphics[4:8, 3:12] = 1
    d = image(pixels | graphics << 13, BitsStored=12, HighBit=11)
    for element, vr, value in ((0x10, "US", 16), (0x11, "US", 18), (0x100, "US", 16), (0x102, "US", 13)):
        d.add_new(0x60000000 | element, vr, value)
    copy, outcome = cleaned(stored(d), tmp_path)
    assert np.array_equal(np.frombuffer(reread(copy).PixelData, np.uint16), pixels.ravel())
    assert outcome.notes == ["graphics in unused bits of pixels removed"] and not outcome.suspicions


def test_other_unused_bits_stay_and_are_told(tmp_path) -> None:
    signed = picture().astype(np.int16) - 40  # the sign is extended into the bits above: ordinary
    d = image(signed, BitsStored=12, HighBit=11, PixelRepresentation=1)
    copy, outcome = cleaned(stored(d), tmp_path)
    assert reread(copy).PixelData == signed.tobytes() and not outcome.suspicions
    d = image(picture() | 0x8000, BitsStored=12, HighBit=11)
    copy, outcome = cleaned(stored(d), tmp_path)
    assert reread(copy).PixelData == d.PixelData and "unused bits" in outcome.suspicions[0]


def jpeg(pixels, comment):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = comment
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, comment=comment.encode(), exif=exif)
    return buffer.getvalue()


def jpeg_2000(pixels, comment):
    whole = imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", level=0)
    place = whole.index(b"\xff\x52")  # before COD: the header is made of segments
    segment = b"\xff\x64" + struct.pack(">HH", 4 + len(comment), 1) + comment.encode()
    return whole[:place] + segment + whole[place:]


def rle(pixels, comment):
    planes = pixels.astype(">u2").view(np.uint8).reshape(-1, 2).T
    segments = [imagecodecs.packbits_encode(plane.tobytes()) for plane in planes]
    segments = [s + b"\x80" * (len(s) % 2) for s in segments]
    offsets = [64, 64 + len(segments[0]) + 20]
    header = struct.pack("<16L", 2, *offsets, *struct.unpack("<3L", comment.encode()[:12]), *[0] * 10)
    return header + segments[0] + comment.encode()[:20].ljust(20, b"\0") + segments[1] + comment.encode()


@pytest.mark.parametrize(
    ("syntax", "encode", "dtype", "fragments"),
    [
        (JPEGBaseline8Bit, jpeg, np.uint8, 1),
        (JPEGBaseline8Bit, jpeg, np.uint8, 3),
        (JPEG2000Lossless, jpeg_2000, np.uint16, 1),
        (JPEG2000Lossless, jpeg_2000, np.uint16, 3),
        (RLELossless, rle, np.uint16, 1),  # a frame is one fragment
    ],
)
def test_comments_inside_compressed_frames_are_blanked(tmp_path, syntax, encode, dtype, fragments) -> None:
    frames = [picture(dtype=dtype), picture(dtype=dtype)[::-1].copy()]
    coded = [encode(frame, MARK * 6) + MARK.encode() for frame in frames]
    d = image(frames[0], NumberOfFrames=2)
    d.file_meta.TransferSyntaxUID = syntax
    d.PixelData = encapsulate(coded, fragments_per_frame=fragments)
    before = pixel_array(reread(stored(d)))
    data = stored(d)
    assert data.count(MARK.encode()) >= 8
    copy, _ = cleaned(data, tmp_path)
    assert_no_mark(copy)
    assert np.array_equal(pixel_array(reread(copy)), before)
    assert len(reread(copy).PixelData) == len(d.PixelData)


def test_compressed_frames_that_are_none_are_refused(tmp_path) -> None:
    for syntax, frame in (
        (JPEG2000Lossless, b"\xff\x4f\xff\x51" + MARK.encode() * 9),
        (RLELossless, b"\1" * 80),
    ):
        d = image(PixelData=encapsulate([frame]))
        d.file_meta.TransferSyntaxUID = syntax
        (tmp_path / "x.dcm").write_bytes(stored(d))
        outcome = run.clean_file(str(tmp_path / "x.dcm"), options(tmp_path))
        assert outcome.reason == "damaged: compressed pixels that are not well-formed"


def test_tables_longer_than_they_say_are_left_out(tmp_path) -> None:
    for tail, kept in ((b"", True), (MARK.encode(), False)):
        item = Dataset()
        item.LUTDescriptor = [4, 0, 16]
        item.add_new(0x00283006, "OW", bytes(range(8)) + tail)
        item.LUTExplanation = MARK
        copy, _ = cleaned(stored(image(VOILUTSequence=[item])), tmp_path)
        assert_no_mark(copy)
        assert ("LUTData" in reread(copy).VOILUTSequence[0]) == kept


# ---- text in the pixels ----


def with_text(pixels, text, *, size=12, at=(4, 4), inverse=False):
    drawn = Image.new("L", pixels.shape[::-1], 0)
    ImageDraw.Draw(drawn).text(at, text, fill=255, font=ImageFont.load_default(size))
    ink = np.asarray(drawn) / 255.0
    value = float(pixels.min() if inverse else pixels.max())
    return (pixels * (1 - ink) + ink * value).astype(pixels.dtype)


@pytest.mark.parametrize(
    ("name", "size", "at"),
    [
        ("MR_small.dcm", 14, (3, 2)),
        ("CT_small.dcm", 12, (3, 2)),
        ("J2K_pixelrep_mismatch.dcm", 14, (256, 462)),
        ("RG1_UNCR.dcm", 32, (92, 1895)),
    ],
)
def test_drawn_text_is_found_and_anatomy_is_not(name, size, at) -> None:
    pixels = pydicom.dcmread(get_testdata_file(name) or "").pixel_array
    if min(pixels.shape) < 100:
        pixels = np.kron(pixels, np.ones((4, 4), pixels.dtype))
    assert not burned_in.shows_text(pixels)
    assert burned_in.shows_text(with_text(pixels, "DOE JOHN 1947", size=size, at=at))
    light = pixels.max() - pixels  # MONOCHROME1: letters are the darkest
    assert burned_in.shows_text(with_text(light, "DOE JOHN 1947", size=size, at=at, inverse=True))


def test_real_ultrasound_with_its_text_is_found() -> None:
    for name in ("examples_rgb_color.dcm", "examples_palette.dcm"):
        assert burned_in.of_pixels(pydicom.dcmread(get_testdata_file(name) or ""), DEFAULT_LIMITS)


@pytest.mark.parametrize(
    ("more", "sign"),
    [
        ({}, None),
        ({"BurnedInAnnotation": "YES"}, "BurnedInAnnotation is YES"),
        ({"modality": "XC"}, "not stated, modality XC"),
        ({"modality": "XC", "BurnedInAnnotation": "NO"}, None),
        ({"sop_class": SecondaryCaptureImageStorage}, "secondary capture"),
        ({"ConversionType": "WSD"}, "secondary capture"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "says secondary"),
        ({"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"]}, "says screen"),
        ({"sop_class": UltrasoundImageStorage, "BurnedInAnnotation": "NO"}, "without regions"),
        ({"modality": "SM", "ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]}, "label"),
    ],
)
def test_signs_of_text(tmp_path, more, sign) -> None:
    copy, outcome = cleaned(stored(image(**more)), tmp_path)
    found = [s for s in outcome.suspicions if sign and sign in s]
    assert (len(found) == 1) == (sign is not None) and bool(outcome.suspicions) == (sign is not None)
    assert reread(copy).PatientIdentityRemoved == ("YES" if sign is None else "NO")


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


# ---- folders ----


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
    assert main([*common, str(mapping), "--out", str(tmp_path / "b")]) == 2
    assert main([*common, str(tmp_path / "c" / "map"), "--out", str(tmp_path / "c")]) == 2
    assert "a secret" in capsys.readouterr().err


def test_folders_that_are_refused(folders, tmp_path) -> None:
    source, _ = folders
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "short").write_bytes(b"123")
    before = tree(tmp_path)
    for out, more, words in [
        (source, {}, "lies in the source"),
        (source / "sub", {}, "lies in the source"),
        (tmp_path / "link" / "sub", {}, "lies in the source"),
        (tmp_path, {}, "contains the source"),
        (tmp_path / "full", {}, "not empty"),
        (tmp_path / "salt", {}, "is a file"),
        (tmp_path / "new", {"salt_file": tmp_path / "short"}, "3 bytes, fewer than 16"),
        (tmp_path / "new", {"salt_file": tmp_path / "none"}, "no such file"),
        (tmp_path / "new", {"salt_file": tmp_path / "new" / "salt"}, "a secret"),
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
    """A pool that breaks at a certain file, as one does when a decoder ends its process."""

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


def test_sequences_nested_too_deeply(tmp_path) -> None:
    item = Dataset()
    for _ in range(40):
        outer = Dataset()
        outer.PixelMeasuresSequence = Sequence([item])
        item = outer
    path = tmp_path / "deep.dcm"
    path.write_bytes(stored(image(PixelMeasuresSequence=[item])))
    assert "nested too deeply" in run.clean_file(str(path), options(tmp_path)).reason
