"""Tests of pixels in de-identification: preserved values, cleared bytes around them, burned-in text."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)

from tests.data.identified_files import MARK, assert_no_mark, cleaned, image, options, picture, reread, stored
from vilam3_jax.data.deidentify import burned_in, profile, run
from vilam3_jax.data.limits import DEFAULT_LIMITS

# ---- unchanged images ----

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
    vocabularies = profile.allow_list().vocabularies.values()
    for text in named:
        is_word = any(vocabulary.fullmatch(text) for vocabulary in vocabularies)
        if len(text) > 6 and not text.startswith("1.2.840.10008") and not is_word and "[" not in text:
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
    signed = picture().astype(np.int16) - 40  # sign extension, which is common
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
    place = whole.index(b"\xff\x52")  # insert a segment before COD
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
        assert outcome.reason == "damaged: malformed compressed pixels"


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
    light = pixels.max() - pixels  # MONOCHROME1, with dark letters
    assert burned_in.shows_text(with_text(light, "DOE JOHN 1947", size=size, at=at, inverse=True))


def test_real_ultrasound_with_its_text_is_found() -> None:
    for name in ("examples_rgb_color.dcm", "examples_palette.dcm"):
        assert burned_in.signs_in_pixels(pydicom.dcmread(get_testdata_file(name) or ""), DEFAULT_LIMITS)


@pytest.mark.parametrize(
    ("more", "sign"),
    [
        ({}, None),
        ({"BurnedInAnnotation": "YES"}, "BurnedInAnnotation is YES"),
        ({"modality": "XC"}, "not stated, modality XC"),
        ({"modality": "XC", "BurnedInAnnotation": "NO"}, None),
        ({"sop_class": SecondaryCaptureImageStorage}, "secondary capture"),
        ({"ConversionType": "WSD"}, "secondary capture"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "states secondary"),
        ({"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"]}, "screen capture"),
        ({"sop_class": UltrasoundImageStorage, "BurnedInAnnotation": "NO"}, "without regions"),
        ({"modality": "SM", "ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]}, "label"),
    ],
)
def test_signs_of_text(tmp_path, more, sign) -> None:
    copy, outcome = cleaned(stored(image(**more)), tmp_path)
    found = [s for s in outcome.suspicions if sign and sign in s]
    assert (len(found) == 1) == (sign is not None) and bool(outcome.suspicions) == (sign is not None)
    assert reread(copy).PatientIdentityRemoved == ("YES" if sign is None else "NO")
