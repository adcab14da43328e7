"""Tests of de-identification of one file: planted identifiers, the basic profile, UIDs, dates, ages."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import struct
import zlib
from datetime import datetime
from importlib import resources

import pydicom.config
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.datadict import DicomDictionary, dictionary_VR, keyword_dict, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
)

from tests.data.identified_files import (
    DATE,
    MARK,
    SALT,
    UID_MARK,
    assert_no_mark,
    cleaned,
    image,
    options,
    picture,
    reread,
    stored,
)
from vilam3_jax.data.deidentify import profile, run
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits


def mark(tag):
    return f"{MARK}{int(tag):08X}"


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
    """An object with marks in every attribute of pydicom's dictionary, and its numeric marks."""
    d = image()
    d.file_meta.TransferSyntaxUID = syntax
    numbers, deep = [], nested(2)  # marks at the top level and three levels below
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
                # In an implicit-VR file, a numeric attribute may contain any text.
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
    """A sequence with VR UN, encoded as implicit VR (PS3.5, 6.2.2)."""
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
    limit = Limits(file_bytes=len(stored(dataset)) + 50)  # smaller than the inflated size
    path = tmp_path / "bomb.dcm"
    dataset.PixelData = bytes(100_000)
    path.write_bytes(stored(dataset))
    assert "larger" in run.clean_file(str(path), options(tmp_path, limits=limit)).reason


def test_sequences_nested_too_deeply(tmp_path) -> None:
    item = Dataset()
    for _ in range(40):
        outer = Dataset()
        outer.PixelMeasuresSequence = Sequence([item])
        item = outer
    path = tmp_path / "deep.dcm"
    path.write_bytes(stored(image(PixelMeasuresSequence=[item])))
    assert "nested too deeply" in run.clean_file(str(path), options(tmp_path)).reason


@functools.cache
def to_damage():
    dataset = image(PatientComments=MARK * 3, StationName=mark(1), KVP="120", BodyPartExamined="HEAD")
    dataset.SourceImageSequence = [nested(1)]
    return stored(dataset)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_leaks_nothing(tmp_path_factory, data) -> None:
    """No damage to tags, lengths and VRs leaks a mark or raises an exception."""
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
            if keyword != "PatientName":  # contains the pseudonym, as the profile permits
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
    """Only dates and characteristics (both options of the standard) and UIDs may be in both."""
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
    second.PatientID = "another"  # references across patients hold, too
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
    code = after.RadionuclideCodeSequence[0]  # with the standard meaning
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
