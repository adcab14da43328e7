"""Rendered DICOM images: agreement with other readers, rejected files, notes, and damage."""

from __future__ import annotations

import struct
import warnings

import highdicom
import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from pixel_files import COLOURS, RAMP, TAGS8, dataset, lut, palette_tags, save
from pydicom.data import get_testdata_file
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    MPEG2MPML,
    ComprehensiveSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    VLWholeSlideMicroscopyImageStorage,
)

from vilam3_jax.data.dicom import codecs
from vilam3_jax.data.dicom.headers import read_dataset
from vilam3_jax.data.dicom.pixels import frame_values, read_image
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError


def real(name):
    return get_testdata_file(name, download=False)


# ---- against other readers


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_jp2klossless.dcm",
        "J2K_pixelrep_mismatch.dcm",  # signed values in an unsigned codestream
        "693_UNCI.dcm",  # 14 bits of 16, signed
        "JPEG-LL.dcm",
        "JPEG2000.dcm",
        "JPGExtended.dcm",  # 12 bits, not supported by gdcm and Pillow
        "emri_small_big_endian.dcm",
        "explicit_VR-UN.dcm",
        "examples_overlay.dcm",
        "image_dfl.dcm",
        "rtdose.dcm",
    ],
)
def test_values_are_those_of_itk(name):
    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(real(name)))
    d = read_dataset(real(name))
    for frame in {0, len(expected) - 1}:
        values, valid = frame_values(d, frame, name)
        np.testing.assert_allclose(values, expected[frame], rtol=1e-6)
        assert (valid is None) == (name != "693_UNCI.dcm")  # has padding


def test_modality_lut_is_that_of_pydicom():
    reference = pydicom.dcmread(real("mlut_18.dcm"))
    values, _ = frame_values(read_dataset(real("mlut_18.dcm")), 0, "mlut_18.dcm")
    np.testing.assert_array_equal(values, apply_modality_lut(reference.pixel_array, reference))


@pytest.mark.parametrize("name", ["RG3_UNCR.dcm", "MR2_J2KR.dcm", "examples_overlay.dcm", "vlut_04.dcm"])
def test_grey_is_that_of_pydicom_and_highdicom(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = pydicom.dcmread(real(name))
        image = highdicom.imread(real(name))
        by_highdicom = image.get_frame(1, apply_voi_transform=True, voi_output_range=(0, 255))
        values = apply_modality_lut(reference.pixel_array, reference)
        ends = apply_modality_lut(np.array([0, 2**reference.BitsStored - 1]), reference)
        if "VOILUTSequence" in reference:
            ends = np.array([0, 65535])
        by_pydicom = (apply_voi_lut(values, reference).astype(float) - ends[0]) / (ends[1] - ends[0]) * 255
    if reference.PhotometricInterpretation == "MONOCHROME1":
        by_pydicom = 255 - by_pydicom
    image = read_image(real(name)).pixels
    np.testing.assert_allclose(image, by_pydicom, atol=0.51)
    np.testing.assert_allclose(image, by_highdicom, atol=1)


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("SC_rgb_rle.dcm", "SC_rgb.dcm", 0),
        ("SC_rgb_expb.dcm", "SC_rgb.dcm", 0),
        ("SC_rgb_16bit.dcm", "SC_rgb.dcm", 0),
        ("SC_rgb_rle_16bit.dcm", "SC_rgb.dcm", 0),
        ("SC_rgb_expb_32bit.dcm", "SC_rgb.dcm", 0),
        ("SC_ybr_full_uncompressed.dcm", "SC_rgb.dcm", 6),
        ("SC_rgb_gdcm_KY.dcm", "SC_rgb_gdcm2k_uncompressed.dcm", 0),
        ("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_ebcr_dcmd.dcm", 1),
        ("SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_ebcyn1_dcmd.dcm", 2),
        ("SC_rgb_dcmtk_+eb+cy+s2.dcm", "SC_rgb_dcmtk_ebcys2_dcmd.dcm", 2),
        ("SC_rgb_jpeg_dcmtk.dcm", "SC_ybr_full_uncompressed.dcm", 1),
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb.dcm", 0),
        ("US1_J2KR.dcm", "US1_UNCR.dcm", 0),
        ("US1_J2KI.dcm", "US1_UNCI.dcm", 0),
        ("color-pl.dcm", "color-px.dcm", 0),
        ("OBXXXX1A_rle.dcm", "OBXXXX1A.dcm", 0),
        ("OBXXXX1A_expb.dcm", "OBXXXX1A.dcm", 0),
        ("gdcm-US-ALOKA-16_big.dcm", "gdcm-US-ALOKA-16.dcm", 0),
        ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm", 0),
        ("emri_small_jpeg_2k_lossless.dcm", "emri_small.dcm", 0),
        ("emri_small_RLE.dcm", "emri_small.dcm", 0),
        ("liver_expb.dcm", "liver.dcm", 0),
    ],
)
def test_an_image_does_not_depend_on_how_it_is_stored(name, reference, tolerance):
    image, expected = (read_image(real(one)).pixels for one in (name, reference))
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(
    "name", ["examples_ybr_color.dcm", "SC_rgb_small_odd_jpeg.dcm", "GDCMJ2K_TextGBR.dcm"]
)
def test_colour_is_that_of_itk(name):
    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(real(name)))
    image = read_image(real(name), frame=0)
    np.testing.assert_array_equal(image.pixels, expected.reshape(-1, *image.pixels.shape)[0])


@pytest.mark.parametrize("name", ["OBXXXX1A.dcm", "OT-PAL-8-face.dcm", "gdcm-US-ALOKA-16.dcm"])
def test_palette_is_that_of_pydicom(name):
    reference = pydicom.dcmread(real(name), force=True)
    if "TransferSyntaxUID" not in reference.file_meta:
        reference.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    expected = apply_color_lut(reference.pixel_array, reference) >> 8
    np.testing.assert_array_equal(read_image(real(name)).pixels, expected)


# ---- rejected files


@pytest.mark.parametrize(
    ("message", "pixels", "tags"),
    [
        ("the photometric interpretation HSV is not supported", COLOURS, {"photometric": "HSV"}),
        ("the photometric interpretation ARGB", COLOURS, {"photometric": "ARGB"}),
        ("the photometric interpretation CMYK", COLOURS, {"photometric": "CMYK"}),
        ("the photometric interpretation XYB", COLOURS, {"photometric": "XYB"}),
        ("the photometric interpretation YBR_PARTIAL_420", COLOURS, {"photometric": "YBR_PARTIAL_420"}),
        ("Photometric Interpretation is empty", RAMP, {"photometric": ""}),
        ("YBR_RCT requires JPEG 2000", COLOURS, {"photometric": "YBR_RCT"}),
        ("Samples per Pixel of 3 contradicts", COLOURS, {}),
        ("Samples per Pixel of 1 contradicts", RAMP, {"photometric": "RGB"}),
        ("PaletteColorLookupTableDescriptor is not three numbers", RAMP, {"photometric": "PALETTE COLOR"}),
        ("12 bits allocated and 12 stored", RAMP, {"BitsAllocated": 12, "BitsStored": 12}),
        ("8 bits allocated and 9 stored", RAMP, {"BitsStored": 9}),
        ("Pixel Representation of 2", RAMP, {"PixelRepresentation": 2}),
        ("0 rows and 16 columns", RAMP, {"Rows": 0}),
        ("Columns is missing", RAMP, {"Columns": None}),
        ("Number of Frames of -3", RAMP, {"NumberOfFrames": -3}),
        ("256 bytes of pixel data, expected 768", RAMP, {"NumberOfFrames": 3}),
        ("65535 x 65535 pixels, more than the limit", RAMP, {"Rows": 65535, "Columns": 65535}),
        ("2000000000 frames, more than the limit", RAMP, {"NumberOfFrames": 2_000_000_000}),
        ("the pixel data is empty", b"", TAGS8),
        ("no decoder for the transfer syntax MPEG2 .*; export it", b"1234", {**TAGS8, "syntax": MPEG2MPML}),
        ("no JPEG codestream inside", b"1234", {**TAGS8, "syntax": JPEGBaseline8Bit}),
        ("no JPEG 2000 codestream inside", b"1234", {**TAGS8, "syntax": JPEG2000Lossless}),
        ("RLE", b"1234", {**TAGS8, "syntax": RLELossless}),
    ],
)
def test_refused_in_one_line_that_names_the_file(shown, message, pixels, tags):
    with pytest.raises(UserError, match=rf"image\.dcm: .*{message}") as refused:
        shown(pixels, **tags)
    assert "\n" not in str(refused.value) and " at 0x" not in str(refused.value)


def test_native_pixels_under_a_compressed_syntax(tmp_path):
    d = dataset(imagecodecs.jpegls_encode(RAMP), syntax=JPEGLSLossless, **TAGS8)
    raw = save(tmp_path / "a.dcm", d).read_bytes()
    start = raw.index(b"\xe0\x7f\x10\x00")
    native = raw[:start] + b"\xe0\x7f\x10\x00OB\0\0" + struct.pack("<L", 256) + RAMP.tobytes()
    (tmp_path / "a.dcm").write_bytes(native)
    with pytest.raises(UserError, match="uncompressed pixels contradict the transfer syntax JPEG-LS"):
        read_image(tmp_path / "a.dcm")
    undefined = raw.replace(JPEGLSLossless.encode(), ExplicitVRLittleEndian.encode() + b"\0\0\0")
    (tmp_path / "a.dcm").write_bytes(undefined)
    with pytest.raises(UserError, match="compressed pixels contradict the transfer syntax"):
        read_image(tmp_path / "a.dcm")


def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(shown):
    bomb = bytearray(imagecodecs.jpeg8_encode(RAMP))
    place = bomb.index(b"\xff\xc0") + 5
    bomb[place : place + 4] = struct.pack(">HH", 65500, 65500)
    with pytest.raises(UserError, match="a compressed frame of 65500 x 65500"):
        shown(bytes(bomb), syntax=JPEGBaseline8Bit, **TAGS8)
    with pytest.raises(
        UserError, match="a compressed frame of 16 x 16 with 1 samples, the header states 8 x 32"
    ):
        shown(imagecodecs.jpegls_encode(RAMP), syntax=JPEGLSLossless, **(TAGS8 | {"Rows": 8, "Columns": 32}))


def test_limits(shown):
    with pytest.raises(UserError, match="more than the limit of 100; scale"):
        shown(RAMP, limits=Limits(pixels=100))
    with pytest.raises(UserError, match="more than the limit of 300; split"):
        shown(RAMP, limits=Limits(file_bytes=300))
    with pytest.raises(UserError, match="a frame above the limit of 200 bytes"):
        shown(RAMP, limits=Limits(decoded_bytes=200))


def test_a_missing_decoder_names_the_syntax_and_the_extra(tmp_path, monkeypatch):
    path = save(tmp_path / "j.dcm", dataset(imagecodecs.jpegls_encode(RAMP), syntax=JPEGLSLossless, **TAGS8))
    expected = read_image(path).pixels
    monkeypatch.setattr(codecs, "_decoder", lambda syntax: None)
    np.testing.assert_array_equal(read_image(path).pixels, expected)  # pydicom's plugins
    plugins = codecs.get_decoder(JPEGLSLossless)
    monkeypatch.setattr(plugins, "_available", {})
    with pytest.raises(UserError) as refused:
        read_image(path)
    assert str(refused.value) == (
        f"{path}: no decoder for the transfer syntax JPEG-LS Lossless Image Compression; "
        "`pip install 'vilam3-jax[dicom]'`, or export it as Explicit VR Little Endian"
    )


def test_objects_without_pixels_are_named(tmp_path):
    d = dataset(RAMP, PixelData=None, SOPClassUID=ComprehensiveSRStorage)
    with pytest.raises(
        UserError, match=r"sr\.dcm: a DICOM object without pixels \(Comprehensive SR Storage\)"
    ):
        read_image(save(tmp_path / "sr.dcm", d))


def test_colours_are_no_values(tmp_path):
    path = save(tmp_path / "c.dcm", dataset(COLOURS, "RGB"))
    with pytest.raises(UserError, match="pixels of RGB are colours"):
        frame_values(read_dataset(path), 0, path)


# ---- notes and metadata


@pytest.mark.parametrize(
    ("tags", "note"),
    [
        ({"PixelAspectRatio": [4, 3]}, "pixels are not square (Pixel Aspect Ratio 4 to 3)"),
        ({"PixelSpacing": [0.5, 0.25]}, "pixels are not square (Pixel Spacing 0.5 to 0.25)"),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, "pixels are not square (Imager Pixel Spacing 0.2 to 0.1)"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "not for presentation"),
        ({"PixelPresentation": "COLOR"}, "the supplemental colour palette is not applied"),
        ({"PresentationLUTSequence": [lut([0, 1])]}, "the Presentation LUT Sequence is not applied"),
        (
            {"SOPClassUID": VLWholeSlideMicroscopyImageStorage},
            "a frame of a whole-slide image is one tile of it",
        ),
        ({"PixelRepresentation": None}, "PixelRepresentation is missing; 0 is assumed"),
        ({"BitsStored": None}, "BitsStored is missing; 8 is assumed"),
        ({"SamplesPerPixel": None}, "SamplesPerPixel is missing; 1 is assumed"),
    ],
)
def test_notes(shown, tags, note):
    image = shown(RAMP, **tags)
    np.testing.assert_array_equal(image.pixels, RAMP)
    assert len(image.notes) == 1 and note in image.notes[0]


def test_what_the_file_states(shown):
    image = shown(RAMP, BodyPartExamined="CHEST", PixelAspectRatio=[1, 1])
    assert (image.modality, image.body_part, image.notes) == ("DX", "CHEST", ())
    image = shown(RAMP, Modality=None, BodyPartExamined="Doe^Jane")  # may contain a name
    assert (image.modality, image.body_part) == ("unknown", "unknown")


def test_cine(shown):
    frames = np.stack([np.full((8, 8), 10 * k, np.uint8) for k in range(5)])
    tags = {"Rows": 8, "Columns": 8, "SamplesPerPixel": 1, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    tags |= {"NumberOfFrames": 5, "Modality": "US"}
    middle = shown(frames.tobytes(), **tags)
    assert (middle.frame, middle.frames, middle.modality) == (2, 5, "US")
    assert middle.notes == ("frame 2 of 0 to 4 is shown, the middle one",)
    assert (middle.pixels == 20).all() and (shown(frames.tobytes(), frame=4, **tags).pixels == 40).all()
    for frame in (5, -1):
        with pytest.raises(UserError, match="choose one of 0 to 4"):
            shown(frames.tobytes(), frame=frame, **tags)
    for stated in (0, None):
        image = shown(frames.tobytes(), **(tags | {"NumberOfFrames": stated}))
        assert image.frames == 1 and any("bytes after the last frame" in note for note in image.notes)


# ---- damage


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    small = {
        "native": dataset(
            RAMP, WindowCenter=[40, 80], WindowWidth=[80, 9], VOILUTSequence=[lut([0, 9, 300])]
        ),
        "implicit": dataset(RAMP, syntax=ImplicitVRLittleEndian, ModalityLUTSequence=[lut(list(range(256)))]),
        "deflated": dataset(RAMP, syntax=DeflatedExplicitVRLittleEndian),
        "palette": dataset(RAMP, "PALETTE COLOR", **palette_tags([bytes(range(256))] * 3, bits=8)),
        "jpeg": dataset(imagecodecs.jpeg8_encode(RAMP), syntax=JPEGBaseline8Bit, **TAGS8),
        "j2k": dataset(imagecodecs.jpeg2k_encode(RAMP, codecformat="j2k"), syntax=JPEG2000Lossless, **TAGS8),
        "jls": dataset(imagecodecs.jpegls_encode(RAMP), syntax=JPEGLSLossless, **TAGS8),
    }
    rle = dataset(RAMP)
    rle.compress(RLELossless, encoding_plugin="pydicom")
    return [save(folder / name, d).read_bytes() for name, d in (small | {"rle": rle}).items()]


@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, 7),
    keep=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
)
def test_damaged_files_give_an_image_or_one_clear_line(tmp_path_factory, seeds, which, keep, changes):
    raw = bytearray(seeds[which])
    for place, value in changes:
        raw[int(place * len(raw))] = value
    path = tmp_path_factory.mktemp("damage") / "d.dcm"
    path.write_bytes(raw if changes else raw[: int(keep * len(raw))])
    try:
        image = read_image(path)
    except UserError as error:
        assert "d.dcm" in str(error) and "\n" not in str(error)
    else:
        assert image.pixels.dtype == np.uint8 and image.pixels.ndim in (2, 3)
