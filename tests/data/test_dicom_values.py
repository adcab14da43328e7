"""DICOM pixel values: stored bits, rescaling, padding, and compressed frames."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pixel_files import COLOURS, RAMP, TAGS8, TAGS_COLOURS, curve, dataset, save, with_text
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import (
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
)

from vilam3_jax.data.dicom import codecs
from vilam3_jax.data.dicom.headers import read_dataset
from vilam3_jax.data.dicom.pixels import frame_values, read_image, value_notes
from vilam3_jax.errors import UserError


def values_of(tmp_path, d):
    path = save(tmp_path / "values.dcm", d)
    return frame_values(read_dataset(path), 0, path)


# ---- stored values


@pytest.mark.parametrize(
    ("cells", "signed", "bits", "high", "expected"),
    [
        ([0xF123, 0x0FFF], 0, 12, 11, [0x123, 0xFFF]),  # an overlay in the high bits
        ([0x0FFF, 0xF800, 0x07FF], 1, 12, 11, [-1, -2048, 2047]),  # signed 12 in 16
        ([0x1230, 0xFFF5], 0, 12, 15, [0x123, 0xFFF]),  # high-aligned
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
    image = shown(RAMP.astype(np.uint16), BitsStored=8, HighBit=3)
    np.testing.assert_array_equal(image.pixels, RAMP)
    assert "High Bit of 3 contradicts 8 bits stored and is ignored" in image.notes


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
        np.testing.assert_array_equal(read_image(path, frame=k).pixels, frame * 255)


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
        read_image(path)


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
        np.testing.assert_allclose(read_image(path, frame=k).pixels.ravel(), expected, atol=0.51)
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
        image = read_image(path).pixels
        assert image[0, :4].tolist() == [0, 255, 0, 0] and image[15, 15] == 255


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


def test_an_image_of_padding_alone_is_refused(shown):
    with pytest.raises(UserError, match="all pixels are padding or NaN"):
        shown(np.full((4, 4), 7, np.uint16), PixelPaddingValue=7)


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


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_signed_rle_with_all_bits_stored(tmp_path, dtype):
    pixels = np.array([[-5, 3], [100, -128]], dtype)
    d = dataset(pixels)
    d.compress(RLELossless, encoding_plugin="pydicom")
    np.testing.assert_array_equal(values_of(tmp_path, d)[0], pixels)


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
    with pytest.raises(UserError, match="the compressed frame is cut short"):  # libjpeg would fill with grey
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
    # A lossless codec of whole cells preserves an overlay outside the stored bits.
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
