"""DICOM pictures: what a display shows, against pydicom, highdicom, ITK and the standard's formulas."""

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
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut, convert_color_space
from pydicom.uid import (
    MPEG2MPML,
    ComprehensiveSRStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
    VLWholeSlideMicroscopyImageStorage,
    generate_uid,
)

from vilam3_jax.data.dicom import codecs, read_film
from vilam3_jax.data.dicom.headers import read_dataset
from vilam3_jax.data.dicom.lookup_tables import read_table
from vilam3_jax.data.dicom.pixels import frame_values, read_picture, value_notes
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import InputWarning, UserError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
TAGS8 = {"Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
COLOURS = np.random.default_rng(3).integers(0, 256, (6, 8, 3)).astype(np.uint8)
TAGS_COLOURS = TAGS8 | {"Rows": 6, "Columns": 8, "SamplesPerPixel": 3, "PlanarConfiguration": 0}


def real(name):
    return get_testdata_file(name, download=False)


def dataset(pixels, photometric="MONOCHROME2", *, syntax=ExplicitVRLittleEndian, **tags):
    """An image in memory: `pixels` is [H, W], [H, W, 3] or bytes of the given Rows and Columns."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = syntax
    d.SOPClassUID, d.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    d.Modality, d.PhotometricInterpretation = "DX", photometric
    d.PixelRepresentation = 0
    if isinstance(pixels, np.ndarray):
        d.Rows, d.Columns = pixels.shape[:2]
        d.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
        d.BitsAllocated = d.BitsStored = 8 * pixels.dtype.itemsize
        d.HighBit = d.BitsStored - 1
        d.PixelRepresentation = int(pixels.dtype.kind == "i")
        if pixels.ndim == 3:
            d.PlanarConfiguration = 0
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        pixels = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    d.PixelData = pixels + b"\0" * (len(pixels) % 2)
    d["PixelData"].VR = "OB" if tags.get("BitsAllocated", d.get("BitsAllocated")) == 8 else "OW"
    for key, value in tags.items():
        if value is None:
            d.pop(key, None)
        else:
            setattr(d, key, value)
    if syntax.is_encapsulated and not d.PixelData.startswith(b"\xfe\xff\x00\xe0"):
        d.PixelData = encapsulate([pixels])
    if syntax.is_encapsulated:
        d["PixelData"].VR = "OB"
        d["PixelData"].is_undefined_length = True
    return d


def save(path, d):
    d.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def shown(tmp_path):
    """Writes an image and reads it as a picture."""

    def show(pixels, photometric="MONOCHROME2", *, frame=None, voi=0, limits=None, **tags):
        path = save(tmp_path / "image.dcm", dataset(pixels, photometric, **tags))
        return read_picture(path, frame=frame, voi=voi, limits=limits or Limits())

    return show


def lut(entries, first=0, bits=16, vr="US", descriptor_vr="US"):
    item = Dataset()
    item.add_new("LUTDescriptor", descriptor_vr, [len(entries) % 65536, first, bits])
    item.add_new("LUTData", vr, entries if vr == "US" else np.asarray(entries, "<u2").tobytes())
    return item


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
        "JPGExtended.dcm",  # 12 bits, which neither gdcm nor Pillow decodes
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
        assert (valid is None) == (name != "693_UNCI.dcm")  # which has padding


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
    picture = read_picture(real(name)).pixels
    np.testing.assert_allclose(picture, by_pydicom, atol=0.51)
    np.testing.assert_allclose(picture, by_highdicom, atol=1)


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
def test_a_picture_does_not_depend_on_how_it_is_stored(name, reference, tolerance):
    picture, expected = (read_picture(real(one)).pixels for one in (name, reference))
    assert picture.dtype == np.uint8 and picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(
    "name", ["examples_ybr_color.dcm", "SC_rgb_small_odd_jpeg.dcm", "GDCMJ2K_TextGBR.dcm"]
)
def test_colour_is_that_of_itk(name):
    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(real(name)))
    picture = read_picture(real(name), frame=0)
    np.testing.assert_array_equal(picture.pixels, expected.reshape(-1, *picture.pixels.shape)[0])


@pytest.mark.parametrize("name", ["OBXXXX1A.dcm", "OT-PAL-8-face.dcm", "gdcm-US-ALOKA-16.dcm"])
def test_palette_is_that_of_pydicom(name):
    reference = pydicom.dcmread(real(name), force=True)
    if "TransferSyntaxUID" not in reference.file_meta:
        reference.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    expected = apply_color_lut(reference.pixel_array, reference) >> 8
    np.testing.assert_array_equal(read_picture(real(name)).pixels, expected)


# ---- display settings


def curve(centre, width, function, x):
    """PS3.3 C.11.2.1.2.1 and C.11.2.1.3, with an output of 0 to 255, written as the standard writes it."""
    if function == "LINEAR":
        if x <= centre - 0.5 - (width - 1) / 2:
            return 0
        if x > centre - 0.5 + (width - 1) / 2:
            return 255
        return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255
    if function == "LINEAR_EXACT":
        return (
            0
            if x <= centre - width / 2
            else 255
            if x > centre + width / 2
            else (x - centre) / width * 255 + 127.5
        )
    return 255 / (1 + np.exp(-4 * (x - centre) / width))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(
    ("centre", "width"), [(128, 256), (100, 50), (128, 1), (127.5, 2), (-40, 90), (200, 4000)]
)
def test_windows(shown, centre, width, function):
    tags = {} if function is None else {"VOILUTFunction": function}
    found = shown(RAMP, WindowCenter=centre, WindowWidth=width, **tags).pixels.ravel()
    expected = [curve(centre, width, function or "LINEAR", x) for x in range(256)]
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_identity_window_changes_nothing(shown):
    np.testing.assert_array_equal(shown(RAMP, WindowCenter=128, WindowWidth=256).pixels, RAMP)


def test_windows_apply_to_rescaled_values(shown):
    pixels = np.arange(4096, dtype=np.int16).reshape(64, 64)
    found = shown(pixels, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400).pixels
    expected = [curve(40, 400, "LINEAR", x - 1024) for x in range(4096)]
    np.testing.assert_allclose(found.ravel(), expected, atol=0.51)


def test_one_of_several_settings_is_chosen_by_its_index(shown):
    tags = {
        "VOILUTSequence": [lut([0] * 128 + [65535] * 128)],
        "WindowCenter": [40, 200],
        "WindowWidth": [80, 100],
    }
    first = shown(RAMP, **tags)
    np.testing.assert_array_equal(first.pixels.ravel(), [0] * 128 + [255] * 128)
    assert (
        "display setting 0 is shown; the file has 0: VOI LUT 0, 1: window 40/80, 2: window 200/100"
        in first.notes
    )
    for voi, (centre, width) in ((1, (40, 80)), (2, (200, 100))):
        expected = [curve(centre, width, "LINEAR", x) for x in range(256)]
        np.testing.assert_allclose(shown(RAMP, voi=voi, **tags).pixels.ravel(), expected, atol=0.51)
    for voi in (3, -1):
        with pytest.raises(
            UserError, match=r"no display setting -?\d; the file has 0: VOI LUT 0, 1: window 40/80"
        ):
            shown(RAMP, voi=voi, **tags)
    with pytest.raises(UserError, match="no display setting 1; the file has none"):
        shown(RAMP, voi=1)


@pytest.mark.parametrize(
    ("tags", "note"),
    [
        ({"WindowCenter": 40, "WindowWidth": 0}, "window 40/0 is left out, its width is not positive"),
        ({"WindowCenter": 40, "WindowWidth": -3}, "its width is not positive"),
        ({"WindowCenter": 40}, "1 window centres and 0 widths"),
        ({"VOILUTSequence": [lut([1, 2], bits=0)]}, "VOI LUT 0 is left out, LUTDescriptor states 0 bits"),
    ],
)
def test_settings_that_cannot_be_applied_are_left_out_and_said(shown, tags, note):
    picture = shown(RAMP, **tags)
    np.testing.assert_array_equal(picture.pixels, RAMP)
    assert any(note in one for one in picture.notes), picture.notes


def with_text(path, d, old, new):
    """Writes an image in which one text stands where a writer of ours would not put it."""
    raw = save(path, d).read_bytes()
    assert raw.count(old) == 1 and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))
    return path


@pytest.mark.parametrize("text", [b"N/A   ", b"40,123", b"nan   ", b"\\40   "])
def test_windows_without_numbers_are_left_out_and_said(tmp_path, text):
    d = dataset(RAMP, WindowCenter="40.123", WindowWidth="77")
    picture = read_picture(with_text(tmp_path / "w.dcm", d, b"40.123", text))
    np.testing.assert_array_equal(picture.pixels, RAMP)
    assert any("its centre or width is not a number" in note for note in picture.notes)


def test_a_usable_setting_behind_a_bad_one_is_taken(shown):
    picture = shown(RAMP, WindowCenter=[40, 100], WindowWidth=[0, 50])
    np.testing.assert_allclose(
        picture.pixels.ravel(), [curve(100, 50, "LINEAR", x) for x in range(256)], atol=0.51
    )
    with pytest.raises(UserError, match="cannot be applied"):
        shown(RAMP, WindowCenter=[100, 40], WindowWidth=[50, 0], voi=1)


def test_a_width_below_one_is_shown_exactly(shown):
    pixels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    tags = {"PixelData": None, "Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "BitsAllocated": 32}
    picture = shown(b"", FloatPixelData=pixels.tobytes(), WindowCenter=0.5, WindowWidth=0.5, **tags)
    expected = np.clip((pixels - 0.5) / 0.5 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(picture.pixels, expected, atol=0.51)
    assert any("LINEAR_EXACT" in note for note in picture.notes)


def test_an_unknown_function_is_refused_by_name(shown):
    with pytest.raises(UserError, match="VOI LUT Function CUBIC is not read"):
        shown(RAMP, WindowCenter=1, WindowWidth=2, VOILUTFunction="CUBIC")


def test_without_a_setting_eight_bits_are_shown_as_they_are(shown):
    pixels = RAMP // 2 + 20
    np.testing.assert_array_equal(shown(pixels).pixels, pixels)
    np.testing.assert_array_equal(shown(pixels // 16, BitsStored=4, HighBit=3).pixels, pixels // 16 * 17)


def test_without_a_setting_deep_values_are_stretched_without_their_extremes(shown):
    pixels = np.random.default_rng(0).integers(1000, 3001, (64, 64)).astype(np.uint16)
    pixels[0, 0] = 65535
    grey = shown(pixels).pixels
    assert grey.max() == grey[0, 0] == 255 and grey.min() == 0
    np.testing.assert_allclose(
        grey.ravel()[1:], np.clip((pixels.ravel()[1:] - 1000) / 2000, 0, 1) * 255, atol=4
    )


def test_values_of_any_size_are_stretched(shown):
    tags = {"PixelData": None, "Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "BitsAllocated": 32}
    pixels = RAMP.astype(np.float32)
    expected = shown(b"", FloatPixelData=pixels.tobytes(), **tags).pixels
    assert np.ptp(expected) == 255
    for factor in (1e-12, 1e12):
        scaled = (pixels * np.float32(factor)).tobytes()
        np.testing.assert_allclose(shown(b"", FloatPixelData=scaled, **tags).pixels, expected, atol=1)
    assert not shown(np.full((4, 4), 500, np.uint16)).pixels.any()


def test_a_nearly_empty_picture_shows_what_differs(shown):
    pixels = np.zeros((64, 64), np.uint16)
    pixels[5, 5], pixels[6, 6] = 1000, 500
    grey = shown(pixels).pixels
    assert (grey[5, 5], grey[6, 6], grey[0, 0]) == (255, 128, 0)


# ---- lookup tables


def test_voi_lut_maps_from_its_first_value_and_holds_its_ends(shown):
    table = lut([0, 16384, 32768, 65535], first=100)
    found = shown(RAMP, VOILUTSequence=[table]).pixels.ravel()
    np.testing.assert_array_equal(found[[0, 99, 100, 101, 102, 103, 200]], [0, 0, 0, 64, 128, 255, 255])


def test_voi_lut_wins_over_a_window_and_follows_the_modality_lut(shown):
    inverted = lut(list(range(255, -1, -1)), bits=8)
    threshold = lut([0] * 200 + [255] * 56, bits=8)
    tags = {
        "ModalityLUTSequence": [inverted],
        "VOILUTSequence": [threshold],
        "WindowCenter": 1,
        "WindowWidth": 2,
    }
    np.testing.assert_array_equal(shown(RAMP, **tags).pixels, np.where(255 - RAMP >= 200, 255, 0))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    "table",
    [
        lut(list(range(0, 65536, 257)), bits=16),
        lut(list(range(0, 65536, 257)), bits=16, vr="OW"),
        lut([*list(range(0, 4096, 16))[:-1], 4095], bits=12),
        lut(list(range(256)), bits=8),
        lut(list(range(256)), bits=8, vr="OW"),
    ],
)
def test_luts_of_every_width_and_representation(shown, syntax, table):
    np.testing.assert_allclose(shown(RAMP, VOILUTSequence=[table], syntax=syntax).pixels, RAMP, atol=1)


def test_lut_of_eight_bit_entries_packed_in_pairs():
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [5, 0, 8])
    item.add_new("LUTData", "OW", bytes([1, 2, 3, 4, 5, 0]))
    np.testing.assert_array_equal(read_table(item, (0, 255), dataset(RAMP), []).entries, [1, 2, 3, 4, 5])


def test_lut_of_65536_entries_says_zero(shown):
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = shown(pixels, VOILUTSequence=[lut(list(range(65536)), vr="OW")]).pixels
    np.testing.assert_allclose(found, pixels / 257, atol=0.51)


@pytest.mark.parametrize(
    ("first", "descriptor_vr"), [(-1024, "SS"), (64512, "US")]
)  # one number, as explicit VR writers that know or do not know the sign write it
def test_negative_first_value_of_a_lut(shown, first, descriptor_vr):
    pixels = np.arange(256, dtype=np.int16).reshape(16, 16)
    table = lut([0] * 1124 + [255], first=first, bits=8, descriptor_vr=descriptor_vr)
    found = shown(pixels, RescaleIntercept=0, RescaleSlope=1, VOILUTSequence=[table]).pixels
    np.testing.assert_array_equal(found, np.where(pixels >= 100, 255, 0))


def test_large_first_value_read_as_signed():
    item = lut([7, 8], first=-5536, descriptor_vr="SS")  # 60000 in 16 bits
    assert read_table(item, (0, 65535), dataset(RAMP), []).first == 60000


def test_understated_bits_of_a_lut_are_corrected_and_said(shown):
    picture = shown(RAMP, VOILUTSequence=[lut([16 * x for x in range(256)], bits=8)])
    np.testing.assert_allclose(picture.pixels, RAMP, atol=1)
    assert "a lookup table states 8 bits, its entries have 12 and are read so" in picture.notes


def test_overstated_bits_of_a_voi_lut_are_corrected_and_said(shown):
    entries = (4 * np.arange(256)).tolist()  # 10 bits, stated as 16
    picture = shown(RAMP, VOILUTSequence=[lut(entries, bits=16)])
    np.testing.assert_array_equal(picture.pixels, np.rint(4 * RAMP.astype(float) / 1023 * 255))
    assert picture.notes == ("a VOI LUT states 16 bits, its entries have 10 and are read so",)
    dim = shown(RAMP, VOILUTSequence=[lut([40] * 256, bits=8)])
    assert (dim.pixels == 40).all() and not dim.notes


def test_a_short_modality_lut_is_refused(shown):
    table = lut([1, 2, 3])
    table.LUTDescriptor = [4, 0, 16]
    with pytest.raises(UserError, match="LUTData has 3 entries, its descriptor says 4"):
        shown(RAMP, ModalityLUTSequence=[table])


# ---- polarity


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted", "noted"),
    [
        ("MONOCHROME2", None, False, False),
        ("MONOCHROME2", "IDENTITY", False, False),
        ("MONOCHROME1", None, True, False),
        ("MONOCHROME1", "INVERSE", True, False),  # an ordinary DX
        ("MONOCHROME1", "IDENTITY", True, True),
        ("MONOCHROME2", "INVERSE", True, True),
    ],
)
def test_polarity(shown, photometric, shape, inverted, noted):
    tags = {"WindowCenter": 128, "WindowWidth": 256} | ({"PresentationLUTShape": shape} if shape else {})
    picture = shown(RAMP, photometric, **tags)
    np.testing.assert_array_equal(picture.pixels, 255 - RAMP if inverted else RAMP)
    assert bool(picture.notes) == noted


def test_inversion_comes_after_the_voi_lut(shown):
    table = lut([0] * 200 + [65535] * 56)
    found = shown(RAMP, "MONOCHROME1", VOILUTSequence=[table]).pixels
    np.testing.assert_array_equal(found, np.where(RAMP >= 200, 0, 255))


# ---- stored values


def values_of(tmp_path, d):
    path = save(tmp_path / "values.dcm", d)
    return frame_values(read_dataset(path), 0, path)


@pytest.mark.parametrize(
    ("cells", "signed", "bits", "high", "expected"),
    [
        ([0xF123, 0x0FFF], 0, 12, 11, [0x123, 0xFFF]),  # an overlay in the high bits
        ([0x0FFF, 0xF800, 0x07FF], 1, 12, 11, [-1, -2048, 2047]),  # signed 12 in 16
        ([0x1230, 0xFFF5], 0, 12, 15, [0x123, 0xFFF]),  # stored high
        ([0x8000, 0x7FF0], 1, 12, 15, [-2048, 2047]),
        ([0x1234], 0, 8, 11, [0x23]),
        ([0xFFFF, 0x8000], 1, 16, 15, [-1, -32768]),
    ],
)
def test_only_stored_bits_count(tmp_path, cells, signed, bits, high, expected):
    tags = {"PixelRepresentation": signed, "BitsStored": bits, "HighBit": high}
    pixels = np.array([cells], np.uint16)
    for syntax in (ExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian):
        values, valid = values_of(tmp_path, dataset(pixels, syntax=syntax, **tags))
        assert values.tolist() == [expected] and valid is None


def test_impossible_high_bit_is_ignored_and_said(shown):
    picture = shown(RAMP.astype(np.uint16), BitsStored=8, HighBit=3)
    np.testing.assert_array_equal(picture.pixels, RAMP)
    assert "High Bit of 3 contradicts 8 bits stored and is ignored" in picture.notes


@pytest.mark.parametrize("width", [8, 16, 32])
def test_integers_of_every_width(tmp_path, width):
    for kind in "iu":
        info = np.iinfo(f"{kind}{width // 8}")
        pixels = np.array([[info.min, 1, info.max]], info.dtype)
        values, _ = values_of(tmp_path, dataset(pixels))
        np.testing.assert_array_equal(values, pixels)


def test_one_bit_frames_that_share_a_byte(tmp_path):
    frames = np.random.default_rng(0).integers(0, 2, (3, 3, 5)).astype(np.uint8)
    tags = {"Rows": 3, "Columns": 5, "SamplesPerPixel": 1, "NumberOfFrames": 3, "BitsAllocated": 1}
    packed = np.packbits(frames, bitorder="little").tobytes()
    path = save(tmp_path / "bits.dcm", dataset(packed, BitsStored=1, HighBit=0, **tags))
    for k, frame in enumerate(frames):
        np.testing.assert_array_equal(read_picture(path, frame=k).pixels, frame * 255)


@pytest.mark.parametrize(
    ("tags", "factor", "offset", "noted"),
    [
        ({"RescaleSlope": 2, "RescaleIntercept": -10}, 2, -10, False),
        ({"RescaleSlope": 0, "RescaleIntercept": -10}, 1, -10, True),
        ({"RescaleIntercept": -10}, 1, -10, True),
        ({"RescaleSlope": 0.1, "RescaleIntercept": 0}, np.float64(np.float32(0.1)), 0, False),
        ({"RescaleSlope": "", "RescaleIntercept": ""}, 1, 0, False),
        ({}, 1, 0, False),
    ],
)
def test_rescale(tmp_path, tags, factor, offset, noted):
    d = dataset(RAMP, **tags)
    values, _ = values_of(tmp_path, d)
    np.testing.assert_array_equal(values, RAMP.astype(np.float64) * factor + offset)
    assert bool(value_notes(d, "x")) == noted


def test_a_slope_that_is_no_number_is_refused(tmp_path):
    path = with_text(tmp_path / "s.dcm", dataset(RAMP, RescaleSlope="1.2345"), b"1.2345", b"1,2345")
    with pytest.raises(UserError, match="RescaleSlope is not a number"):
        read_picture(path)


def test_real_world_values_are_not_applied_in_silence(tmp_path):
    mapping = Dataset()
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 2.0, 0.0
    d = dataset(RAMP, RealWorldValueMappingSequence=[mapping])
    np.testing.assert_array_equal(values_of(tmp_path, d)[0], RAMP)
    assert value_notes(d, "x") == ("the Real World Value Mapping is not applied",)


def test_every_frame_has_its_own_rescale_and_window(tmp_path):
    def group(slope, centre):
        item, transform, voi = Dataset(), Dataset(), Dataset()
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = slope, 0, "US"
        voi.WindowCenter, voi.WindowWidth = centre, 256
        item.PixelValueTransformationSequence, item.FrameVOILUTSequence = [transform], [voi]
        return item

    d = dataset(RAMP.tobytes() * 2, Rows=16, Columns=16, SamplesPerPixel=1, NumberOfFrames=2, BitsAllocated=8)
    d.BitsStored, d.HighBit = 8, 7
    d.PerFrameFunctionalGroupsSequence = [group(1, 128), group(2, 256)]
    path = save(tmp_path / "enhanced.dcm", d)
    d = read_dataset(path)
    for k, slope in ((0, 1), (1, 2)):
        np.testing.assert_array_equal(frame_values(d, k, path)[0], RAMP * np.float64(slope))
        expected = [curve(128 * slope, 256, "LINEAR", slope * x) for x in range(256)]
        np.testing.assert_allclose(read_picture(path, frame=k).pixels.ravel(), expected, atol=0.51)
    shared = group(3, 384)
    d = dataset(RAMP, SharedFunctionalGroupsSequence=[shared])
    assert values_of(tmp_path, d)[0].max() == 765


def test_float_pixels(shown, tmp_path):
    pixels = np.linspace(-5, 5, 256, dtype=np.float32).reshape(16, 16)
    pixels[0, :4] = np.nan, np.inf, -np.inf, -9999
    for keyword, width in (("FloatPixelData", 32), ("DoubleFloatPixelData", 64)):
        d = dataset(b"", PixelData=None, Rows=16, Columns=16, SamplesPerPixel=1, BitsAllocated=width)
        del d.PixelRepresentation
        setattr(d, keyword, pixels.astype(f"<f{width // 8}").tobytes())
        setattr(d, keyword.replace("Data", "PaddingValue"), -9999.0)
        path = save(tmp_path / "float.dcm", d)
        values, valid = frame_values(read_dataset(path), 0, path)
        np.testing.assert_array_equal(values, pixels)
        assert valid is not None and (~valid).sum() == 1 and not valid[0, 3]
        picture = read_picture(path).pixels
        assert picture[0, :4].tolist() == [0, 255, 0, 0] and picture[15, 15] == 255


# ---- padding


@pytest.mark.parametrize(
    ("pixels", "tags", "vr", "padding"),
    [
        (np.array([[5, 65535]], np.uint16), {"PixelPaddingValue": 65535}, "US", [65535]),
        (np.array([[5, 65535]], np.uint16), {"PixelPaddingValue": -1}, "SS", [65535]),
        (np.array([[5, -2000]], np.int16), {"PixelPaddingValue": -2000}, "SS", [-2000]),
        (np.array([[5, -2000]], np.int16), {"PixelPaddingValue": 63536}, "US", [-2000]),
        (
            np.array([[5, 10, 12, 20]], np.uint16),
            {"PixelPaddingValue": 10, "PixelPaddingRangeLimit": 12},
            "US",
            [10, 12],
        ),
        (
            np.array([[5, 10, 12, 20]], np.uint16),
            {"PixelPaddingValue": 12, "PixelPaddingRangeLimit": 10},
            "US",
            [10, 12],
        ),
        (
            np.array([[5, -5, -9]], np.int16),
            {"PixelPaddingValue": 65527, "PixelPaddingRangeLimit": 65531},
            "US",
            [-5, -9],
        ),
    ],
)
def test_padding_is_not_valid(tmp_path, pixels, tags, vr, padding):
    d = dataset(pixels, RescaleSlope=3, RescaleIntercept=-7)
    for key, value in tags.items():
        d.add_new(key, vr, value)
    values, valid = values_of(tmp_path, d)
    np.testing.assert_array_equal(values, pixels * 3.0 - 7)
    assert valid is not None and valid.tolist() == (~np.isin(pixels, padding)).tolist()


def test_padding_in_bits_that_values_do_not_use(tmp_path):
    pixels = np.array([[0x8000, 0x0000, 0x0123]], np.uint16)
    d = dataset(pixels, BitsStored=12, HighBit=11)
    d.add_new("PixelPaddingValue", "US", 0x8000)
    values, valid = values_of(tmp_path, d)
    assert values.tolist() == [[0, 0, 0x123]]
    assert valid is not None and valid.tolist() == [[False, True, True]]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_out_of_the_statistics(shown, photometric):
    pixels = np.random.default_rng(0).integers(1000, 3001, (64, 64)).astype(np.uint16)
    pixels[:, 32:] = 65535
    grey = shown(pixels, photometric, PixelPaddingValue=65535).pixels
    assert (grey[:, 32:] == 0).all() and np.ptp(grey[:, :32]) > 250
    assert (grey[0, 0] > 128) == ((pixels[0, 0] > 2000) == (photometric == "MONOCHROME2"))


def test_a_picture_of_padding_alone_is_refused(shown):
    with pytest.raises(UserError, match="not one pixel holds a value"):
        shown(np.full((4, 4), 7, np.uint16), PixelPaddingValue=7)


# ---- colour


def test_planar_configuration(shown):
    planes = np.ascontiguousarray(COLOURS.transpose(2, 0, 1)).tobytes()
    np.testing.assert_array_equal(shown(COLOURS, "RGB").pixels, COLOURS)
    found = shown(planes, "RGB", **(TAGS_COLOURS | {"PlanarConfiguration": 1})).pixels
    np.testing.assert_array_equal(found, COLOURS)
    picture = shown(COLOURS, "RGB", PlanarConfiguration=None)
    np.testing.assert_array_equal(picture.pixels, COLOURS)
    assert any("Planar Configuration" in note for note in picture.notes)


def test_equal_channels_are_a_picture(shown):
    grey = np.repeat(RAMP[..., None], 3, axis=-1)
    picture = shown(grey, "RGB", WindowCenter=40, WindowWidth=400)
    np.testing.assert_array_equal(picture.pixels, grey)
    assert picture.notes == ()


def test_deep_colours_lose_their_low_bits(shown):
    np.testing.assert_array_equal(
        shown(COLOURS.astype(np.uint16) * 16 + 5, "RGB", BitsStored=12, HighBit=11).pixels, COLOURS
    )


@pytest.mark.parametrize("chroma", [False, True])
def test_ybr_without_compression(shown, chroma):
    colours = np.repeat(COLOURS[:, ::2], 2, axis=1)  # pairs alike, so that sharing their chroma loses nothing
    ybr = convert_color_space(colours, "RGB", "YBR_FULL")
    if chroma:
        pairs = ybr.reshape(-1, 2, 3)
        packed = np.stack([pairs[:, 0, 0], pairs[:, 1, 0], pairs[:, 0, 1], pairs[:, 0, 2]], axis=1).tobytes()
        found = shown(packed, "YBR_FULL_422", **TAGS_COLOURS).pixels
        with pytest.raises(UserError, match=r"YBR_FULL_422 has 96; correct the photometric"):
            shown(ybr, "YBR_FULL_422")
    else:
        found = shown(ybr, "YBR_FULL").pixels
    np.testing.assert_allclose(found, colours, atol=2)


def test_ybr_partial_reaches_black_and_white(shown):
    # Y 16 is black, 235 white; 82, 90, 240 is pure red (ITU-R BT.601).
    samples = bytes([16, 235, 128, 128, 82, 82, 90, 240])
    tags = TAGS_COLOURS | {"Rows": 1, "Columns": 4}
    found = shown(samples, "YBR_PARTIAL_422", **tags).pixels[0]
    np.testing.assert_allclose(found, [[0, 0, 0], [255, 255, 255], [255, 0, 0], [255, 0, 0]], atol=2)


def jpeg(colours, adobe=None, jfif=False):
    """A JPEG of the components as they are, with the markers that say what they mean."""
    coded = imagecodecs.jpeg8_encode(
        colours, level=100, colorspace="RGB", outcolorspace="RGB", subsampling="444"
    )
    bare = b"\xff\xd8" + coded[coded.index(b"\xff\xdb") :]
    bare = bare.replace(b"R\x11\x00G\x11\x00B\x11\x00", b"\x01\x11\x00\x02\x11\x00\x03\x11\x00")
    start = bare.index(b"\xff\xda") + 5  # the scan names its components too
    bare = bare[:start] + bare[start:].replace(b"R\x00G\x00B\x00", b"\x01\x00\x02\x00\x03\x00", 1)
    marker = b""
    if adobe is not None:
        marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([adobe])
    if jfif:
        marker = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    return bare[:2] + marker + bare[2:]


SMOOTH = np.stack(
    [*np.meshgrid(np.linspace(40, 200, 16), np.linspace(60, 220, 16)), np.full((16, 16), 90.0)], -1
).astype(np.uint8)


@pytest.mark.parametrize(
    ("adobe", "jfif", "stated", "is_ybr", "noted"),
    [
        (None, False, "RGB", False, False),
        (None, False, "YBR_FULL_422", True, False),
        (0, False, "RGB", False, False),
        (0, False, "YBR_FULL_422", False, True),
        (1, False, "YBR_FULL_422", True, False),
        (1, False, "RGB", True, True),
        (None, True, "YBR_FULL", True, False),
        (None, True, "RGB", True, True),
    ],
)
def test_jpeg_colours_are_converted_once_if_at_all(shown, adobe, jfif, stated, is_ybr, noted):
    samples = convert_color_space(SMOOTH, "RGB", "YBR_FULL") if is_ybr else SMOOTH
    tags = TAGS_COLOURS | {"Rows": 16, "Columns": 16}
    picture = shown(jpeg(samples, adobe, jfif), stated, syntax=JPEGBaseline8Bit, **tags)
    np.testing.assert_allclose(picture.pixels, SMOOTH, atol=6)
    assert bool(picture.notes) == noted


def test_subsampled_chroma_is_no_rgb(shown):
    coded = imagecodecs.jpeg8_encode(SMOOTH, level=100, subsampling="420")
    coded = coded[:2] + coded[coded.index(b"\xff\xdb") :]
    tags = TAGS_COLOURS | {"Rows": 16, "Columns": 16}
    picture = shown(coded, "RGB", syntax=JPEGBaseline8Bit, **tags)
    np.testing.assert_allclose(picture.pixels, SMOOTH, atol=8)
    assert any("holds YBR_FULL" in note for note in picture.notes)


def palette_tags(tables, bits=16, first=0, segmented=False):
    tags = {}
    for colour, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, first, bits]
        key = f"{colour}PaletteColorLookupTableData"
        tags[f"Segmented{key}" if segmented else key] = table
    return tags


def test_palettes(shown):
    colours = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint16)
    deep = palette_tags([(colours[:, c] * 257).astype("<u2").tobytes() for c in range(3)])
    packed = palette_tags([colours[:, c].astype(np.uint8).tobytes() for c in range(3)], bits=8)
    wide = palette_tags([colours[:, c].astype("<u2").tobytes() for c in range(3)], bits=8)
    for tags in (deep, packed, wide):
        picture = shown(RAMP, "PALETTE COLOR", **tags)
        np.testing.assert_array_equal(picture.pixels, colours[RAMP])
        assert picture.notes == ()
    overstated = palette_tags([colours[:, c].astype("<u2").tobytes() for c in range(3)], bits=16)
    picture = shown(RAMP, "PALETTE COLOR", **overstated)
    np.testing.assert_array_equal(picture.pixels, colours[RAMP])
    assert picture.notes == ("the palette states 16 bits, its entries have 8 and are read so",)
    indices = RAMP.astype(np.uint16) + 1000
    shifted = palette_tags([(colours[:, c] * 257).astype("<u2").tobytes() for c in range(3)], first=1000)
    np.testing.assert_array_equal(shown(indices, "PALETTE COLOR", **shifted).pixels, colours[RAMP])


def test_segmented_palette(shown):
    words = struct.pack("<8H", 0, 3, 0, 256, 512, 1, 253, 65535)  # three entries, then a line to white
    picture = shown(RAMP, "PALETTE COLOR", **palette_tags([words] * 3, segmented=True))
    expected = np.array([0, 256, 512, *np.rint(np.linspace(512, 65535, 254)[1:])]).astype(int) >> 8
    np.testing.assert_array_equal(picture.pixels[..., 0], expected[RAMP])
    copies = struct.pack("<8H", 0, 1, 5, 2, 1, 0, 0, 0)  # "repeat that part": refused, it can be made a bomb
    with pytest.raises(UserError, match="a segment of a kind that is not read"):
        shown(RAMP, "PALETTE COLOR", **palette_tags([copies] * 3, segmented=True))


# ---- compressed frames


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (JPEG2000Lossless, lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k")),
        (HTJ2KLossless, imagecodecs.htj2k_encode),
        (JPEGLSLossless, imagecodecs.jpegls_encode),
        (JPEGLossless, lambda a: imagecodecs.jpeg8_encode(a, lossless=True)),
        (JPEGExtended12Bit, lambda a: imagecodecs.jpeg8_encode(a, bitspersample=12, level=100)),
    ],
)
def test_every_syntax_decodes_twelve_bits(tmp_path, syntax, encode):
    y, x = np.mgrid[:48, :64]
    pixels = (x * 40 + y * 20).astype(np.uint16)
    tags = {
        "Rows": 48,
        "Columns": 64,
        "SamplesPerPixel": 1,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
    }
    values, _ = values_of(tmp_path, dataset(encode(pixels), syntax=syntax, **tags))
    assert np.abs(values.astype(int) - pixels).max() <= (1 if syntax == JPEGExtended12Bit else 0)


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLSLossless, JPEG2000Lossless])
def test_signed_values_in_codestreams_without_a_sign(tmp_path, syntax):
    pixels = np.arange(-512, 512, dtype=np.int16).reshape(32, 32)
    bits = (pixels & 0xFFF).astype(np.uint16)
    encode = {
        JPEGLossless: lambda a: imagecodecs.jpeg8_encode(a, lossless=True),
        JPEGLSLossless: imagecodecs.jpegls_encode,
        JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(
            a, level=0, codecformat="j2k", bitspersample=12
        ),
    }[syntax]
    tags = {
        "Rows": 32,
        "Columns": 32,
        "SamplesPerPixel": 1,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
    }
    d = dataset(encode(bits), syntax=syntax, PixelRepresentation=1, **tags)
    np.testing.assert_array_equal(values_of(tmp_path, d)[0], pixels)


def test_a_component_transform_of_jpeg_2000_is_undone_once(shown):
    transformed = imagecodecs.jpeg2k_encode(COLOURS, level=0, codecformat="j2k", mct=True)
    plain = convert_color_space(COLOURS, "RGB", "YBR_FULL")
    for coded, stated, noted in (
        (transformed, "YBR_RCT", False),
        (transformed, "RGB", False),
        (transformed, "YBR_FULL", True),  # the codestream knows better
        (imagecodecs.jpeg2k_encode(plain, level=0, codecformat="j2k", mct=False), "YBR_FULL", False),
        (imagecodecs.jpeg2k_encode(plain, level=0, codecformat="jp2", mct=False), "YBR_FULL", False),
        (
            imagecodecs.jpeg2k_encode(plain, level=0, codecformat="jp2", colorspace="SYCC", mct=False),
            "YBR_FULL",
            False,
        ),
    ):
        picture = shown(coded, stated, syntax=JPEG2000Lossless, **TAGS_COLOURS)
        np.testing.assert_allclose(picture.pixels, COLOURS, atol=2)
        assert bool(picture.notes) == noted


def test_components_of_different_sampling_are_refused(shown):
    coded = bytearray(imagecodecs.jpeg2k_encode(COLOURS, level=0, codecformat="j2k"))
    coded[coded.index(b"\xff\x4f\xff\x51") + 46] = 2  # the second component's horizontal sampling
    with pytest.raises(UserError, match="components of different sampling"):
        shown(bytes(coded), "RGB", syntax=JPEG2000Lossless, **TAGS_COLOURS)


@pytest.mark.parametrize("lossless", [False, True])
def test_jpeg_frames_that_are_cut_short_are_refused(shown, lossless):
    coded = imagecodecs.jpeg8_encode(RAMP, lossless=lossless)
    syntax = JPEGLossless if lossless else JPEGBaseline8Bit
    shown(coded, syntax=syntax, **TAGS8)
    with pytest.raises(UserError, match="the compressed frame is cut short"):  # libjpeg would go on with grey
        shown(coded[:-20], syntax=syntax, **TAGS8)


def test_more_bits_than_the_header_states(shown, tmp_path):
    deep = RAMP.astype(np.uint16) * 16
    with pytest.raises(UserError, match="a compressed frame of 12 bits, the header allocates 8"):
        shown(imagecodecs.jpeg8_encode(deep, bitspersample=12), syntax=JPEGExtended12Bit, **TAGS8)
    tags = TAGS8 | {"BitsAllocated": 16, "BitsStored": 10, "HighBit": 9}
    coded = imagecodecs.jpeg2k_encode(deep, level=0, codecformat="j2k", bitspersample=12)
    d = dataset(coded, syntax=JPEG2000Lossless, **tags)
    np.testing.assert_array_equal(values_of(tmp_path, d)[0], deep)
    assert (
        "values need more than the 10 bits that the header states; all are kept"
        in shown(coded, syntax=JPEG2000Lossless, **tags).notes
    )
    # A lossless codec of whole cells keeps an overlay beside the values.
    cells = deep // 16 | 0x1000
    d = dataset(
        imagecodecs.jpegls_encode(cells), syntax=JPEGLSLossless, **(tags | {"BitsStored": 12, "HighBit": 11})
    )
    np.testing.assert_array_equal(values_of(tmp_path, d)[0], RAMP)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    colours=st.booleans(),
    width=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_rle_is_that_of_pydicom(rows, columns, colours, width, seed):
    shape = (rows, columns, 3) if colours else (rows, columns)
    pixels = np.random.default_rng(seed).integers(0, 3, shape).astype(f"u{width}") << (8 * width - 2)
    d = dataset(pixels, "RGB" if colours else "MONOCHROME2")
    d.compress(RLELossless, encoding_plugin="pydicom")
    coded = get_frame(d.PixelData, 0, number_of_frames=1)
    options = {
        "rows": rows,
        "columns": columns,
        "samples_per_pixel": pixels[0, 0].size,
        "bits_allocated": 8 * width,
    }
    np.testing.assert_array_equal(codecs.decode(coded, RLELossless, options), pixels)


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
        picture = shown(frames.tobytes(), **(tags | {"NumberOfFrames": stated}))
        assert picture.frames == 1 and any("bytes after the last frame" in note for note in picture.notes)


# ---- what is refused, and how


@pytest.mark.parametrize(
    ("message", "pixels", "tags"),
    [
        ("the photometric interpretation HSV is not read", COLOURS, {"photometric": "HSV"}),
        ("the photometric interpretation ARGB", COLOURS, {"photometric": "ARGB"}),
        ("the photometric interpretation CMYK", COLOURS, {"photometric": "CMYK"}),
        ("the photometric interpretation XYB", COLOURS, {"photometric": "XYB"}),
        ("the photometric interpretation YBR_PARTIAL_420", COLOURS, {"photometric": "YBR_PARTIAL_420"}),
        ("Photometric Interpretation is empty", RAMP, {"photometric": ""}),
        ("YBR_RCT belongs to JPEG 2000", COLOURS, {"photometric": "YBR_RCT"}),
        ("Samples per Pixel of 3 contradicts", COLOURS, {}),
        ("Samples per Pixel of 1 contradicts", RAMP, {"photometric": "RGB"}),
        ("PaletteColorLookupTableDescriptor is not three numbers", RAMP, {"photometric": "PALETTE COLOR"}),
        ("12 bits allocated and 12 stored", RAMP, {"BitsAllocated": 12, "BitsStored": 12}),
        ("8 bits allocated and 9 stored", RAMP, {"BitsStored": 9}),
        ("Pixel Representation of 2", RAMP, {"PixelRepresentation": 2}),
        ("0 rows and 16 columns", RAMP, {"Rows": 0}),
        ("Columns is missing", RAMP, {"Columns": None}),
        ("Number of Frames of -3", RAMP, {"NumberOfFrames": -3}),
        ("256 bytes of pixel data, 768 were expected", RAMP, {"NumberOfFrames": 3}),
        ("65535 x 65535 pixels, more than the limit", RAMP, {"Rows": 65535, "Columns": 65535}),
        ("2000000000 frames, more than the limit", RAMP, {"NumberOfFrames": 2_000_000_000}),
        ("its pixel data is empty", b"", TAGS8),
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
    with pytest.raises(UserError, match="not compressed as its transfer syntax JPEG-LS"):
        read_picture(tmp_path / "a.dcm")
    undefined = raw.replace(JPEGLSLossless.encode(), ExplicitVRLittleEndian.encode() + b"\0\0\0")
    (tmp_path / "a.dcm").write_bytes(undefined)
    with pytest.raises(UserError, match="its pixels are compressed, its transfer syntax"):
        read_picture(tmp_path / "a.dcm")


def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(shown):
    bomb = bytearray(imagecodecs.jpeg8_encode(RAMP))
    place = bomb.index(b"\xff\xc0") + 5
    bomb[place : place + 4] = struct.pack(">HH", 65500, 65500)
    with pytest.raises(UserError, match="a compressed frame of 65500 x 65500"):
        shown(bytes(bomb), syntax=JPEGBaseline8Bit, **TAGS8)
    with pytest.raises(
        UserError, match="a compressed frame of 16 x 16 with 1 samples, the header says 8 x 32"
    ):
        shown(imagecodecs.jpegls_encode(RAMP), syntax=JPEGLSLossless, **(TAGS8 | {"Rows": 8, "Columns": 32}))


def test_limits(shown):
    with pytest.raises(UserError, match="more than the limit of 100; scale"):
        shown(RAMP, limits=Limits(pixels=100))
    with pytest.raises(UserError, match="more than the limit of 300; split"):
        shown(RAMP, limits=Limits(file_bytes=300))
    with pytest.raises(UserError, match="a frame over the limit of 200 bytes"):
        shown(RAMP, limits=Limits(decoded_bytes=200))


def test_a_missing_decoder_names_the_syntax_and_the_extra(tmp_path, monkeypatch):
    path = save(tmp_path / "j.dcm", dataset(imagecodecs.jpegls_encode(RAMP), syntax=JPEGLSLossless, **TAGS8))
    expected = read_picture(path).pixels
    monkeypatch.setattr(codecs, "_decoder", lambda syntax: None)
    np.testing.assert_array_equal(read_picture(path).pixels, expected)  # pydicom's plugins
    plugins = codecs.get_decoder(JPEGLSLossless)
    monkeypatch.setattr(plugins, "_available", {})
    with pytest.raises(UserError) as refused:
        read_picture(path)
    assert str(refused.value) == (
        f"{path}: no decoder for the transfer syntax JPEG-LS Lossless Image Compression; "
        "`pip install 'vilam3-jax[dicom]'`, or export it as Explicit VR Little Endian"
    )


def test_objects_without_pixels_are_named(tmp_path):
    d = dataset(RAMP, PixelData=None, SOPClassUID=ComprehensiveSRStorage)
    with pytest.raises(
        UserError, match=r"sr\.dcm: a DICOM object without pixels \(Comprehensive SR Storage\)"
    ):
        read_picture(save(tmp_path / "sr.dcm", d))


def test_colours_are_no_values(tmp_path):
    path = save(tmp_path / "c.dcm", dataset(COLOURS, "RGB"))
    with pytest.raises(UserError, match="pixels of RGB are colours"):
        frame_values(read_dataset(path), 0, path)


# ---- what is said beside the picture


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
        ({"PixelRepresentation": None}, "PixelRepresentation is not stated and taken as 0"),
        ({"BitsStored": None}, "BitsStored is not stated and taken as 8"),
        ({"SamplesPerPixel": None}, "SamplesPerPixel is not stated and taken as 1"),
    ],
)
def test_notes(shown, tags, note):
    picture = shown(RAMP, **tags)
    np.testing.assert_array_equal(picture.pixels, RAMP)
    assert len(picture.notes) == 1 and note in picture.notes[0]


def test_what_the_file_states(shown):
    picture = shown(RAMP, BodyPartExamined="CHEST", PixelAspectRatio=[1, 1])
    assert (picture.modality, picture.body_part, picture.notes) == ("DX", "CHEST", ())
    picture = shown(RAMP, Modality=None, BodyPartExamined="Doe^Jane")  # may name anybody
    assert (picture.modality, picture.body_part) == ("unknown", "unknown")


def test_read_film_warns_of_notes(tmp_path):
    path = save(tmp_path / "film.dcm", dataset(RAMP, "MONOCHROME1", PresentationLUTShape="IDENTITY"))
    with pytest.warns(InputWarning, match=r"film\.dcm: Presentation LUT Shape IDENTITY contradicts"):
        np.testing.assert_array_equal(read_film(path), 255 - RAMP)


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
def test_damaged_files_give_a_picture_or_one_clear_line(tmp_path_factory, seeds, which, keep, changes):
    raw = bytearray(seeds[which])
    for place, value in changes:
        raw[int(place * len(raw))] = value
    path = tmp_path_factory.mktemp("damage") / "d.dcm"
    path.write_bytes(raw if changes else raw[: int(keep * len(raw))])
    try:
        picture = read_picture(path)
    except UserError as error:
        assert "d.dcm" in str(error) and "\n" not in str(error)
    else:
        assert picture.pixels.dtype == np.uint8 and picture.pixels.ndim in (2, 3)
