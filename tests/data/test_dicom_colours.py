"""Colour DICOM images: RGB, YBR and palettes, uncompressed, in JPEG and in JPEG 2000."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import pytest
from pixel_files import COLOURS, RAMP, TAGS_COLOURS, palette_tags
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from vilam3_jax.errors import UserError


def test_planar_configuration(shown):
    planes = np.ascontiguousarray(COLOURS.transpose(2, 0, 1)).tobytes()
    np.testing.assert_array_equal(shown(COLOURS, "RGB").pixels, COLOURS)
    found = shown(planes, "RGB", **(TAGS_COLOURS | {"PlanarConfiguration": 1})).pixels
    np.testing.assert_array_equal(found, COLOURS)
    image = shown(COLOURS, "RGB", PlanarConfiguration=None)
    np.testing.assert_array_equal(image.pixels, COLOURS)
    assert any("Planar Configuration" in note for note in image.notes)


def test_equal_channels_are_an_image(shown):
    grey = np.repeat(RAMP[..., None], 3, axis=-1)
    image = shown(grey, "RGB", WindowCenter=40, WindowWidth=400)
    np.testing.assert_array_equal(image.pixels, grey)
    assert image.notes == ()


def test_deep_colours_lose_their_low_bits(shown):
    np.testing.assert_array_equal(
        shown(COLOURS.astype(np.uint16) * 16 + 5, "RGB", BitsStored=12, HighBit=11).pixels, COLOURS
    )


@pytest.mark.parametrize("chroma", [False, True])
def test_ybr_without_compression(shown, chroma):
    colours = np.repeat(COLOURS[:, ::2], 2, axis=1)  # equal pairs, so that subsampled chroma is lossless
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
    """A JPEG of unconverted components, with the markers that declare their colour space."""
    coded = imagecodecs.jpeg8_encode(
        colours, level=100, colorspace="RGB", outcolorspace="RGB", subsampling="444"
    )
    bare = b"\xff\xd8" + coded[coded.index(b"\xff\xdb") :]
    bare = bare.replace(b"R\x11\x00G\x11\x00B\x11\x00", b"\x01\x11\x00\x02\x11\x00\x03\x11\x00")
    start = bare.index(b"\xff\xda") + 5  # the scan header also names the components
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
    image = shown(jpeg(samples, adobe, jfif), stated, syntax=JPEGBaseline8Bit, **tags)
    np.testing.assert_allclose(image.pixels, SMOOTH, atol=6)
    assert bool(image.notes) == noted


def test_subsampled_chroma_is_no_rgb(shown):
    coded = imagecodecs.jpeg8_encode(SMOOTH, level=100, subsampling="420")
    coded = coded[:2] + coded[coded.index(b"\xff\xdb") :]
    tags = TAGS_COLOURS | {"Rows": 16, "Columns": 16}
    image = shown(coded, "RGB", syntax=JPEGBaseline8Bit, **tags)
    np.testing.assert_allclose(image.pixels, SMOOTH, atol=8)
    assert any("the compressed frame is YBR_FULL, the header states RGB" in note for note in image.notes)


def test_palettes(shown):
    colours = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint16)
    deep = palette_tags([(colours[:, c] * 257).astype("<u2").tobytes() for c in range(3)])
    packed = palette_tags([colours[:, c].astype(np.uint8).tobytes() for c in range(3)], bits=8)
    wide = palette_tags([colours[:, c].astype("<u2").tobytes() for c in range(3)], bits=8)
    for tags in (deep, packed, wide):
        image = shown(RAMP, "PALETTE COLOR", **tags)
        np.testing.assert_array_equal(image.pixels, colours[RAMP])
        assert image.notes == ()
    overstated = palette_tags([colours[:, c].astype("<u2").tobytes() for c in range(3)], bits=16)
    image = shown(RAMP, "PALETTE COLOR", **overstated)
    np.testing.assert_array_equal(image.pixels, colours[RAMP])
    assert image.notes == ("the palette states 16 bits but has 8-bit entries; 8 bits are used",)
    indices = RAMP.astype(np.uint16) + 1000
    shifted = palette_tags([(colours[:, c] * 257).astype("<u2").tobytes() for c in range(3)], first=1000)
    np.testing.assert_array_equal(shown(indices, "PALETTE COLOR", **shifted).pixels, colours[RAMP])


def test_segmented_palette(shown):
    words = struct.pack("<8H", 0, 3, 0, 256, 512, 1, 253, 65535)  # three entries, then a line to white
    image = shown(RAMP, "PALETTE COLOR", **palette_tags([words] * 3, segmented=True))
    expected = np.array([0, 256, 512, *np.rint(np.linspace(512, 65535, 254)[1:])]).astype(int) >> 8
    np.testing.assert_array_equal(image.pixels[..., 0], expected[RAMP])
    copies = struct.pack("<8H", 0, 1, 5, 2, 1, 0, 0, 0)  # an indirect segment: allows bombs
    with pytest.raises(UserError, match="a segment of an unsupported type"):
        shown(RAMP, "PALETTE COLOR", **palette_tags([copies] * 3, segmented=True))


def test_a_component_transform_of_jpeg_2000_is_undone_once(shown):
    transformed = imagecodecs.jpeg2k_encode(COLOURS, level=0, codecformat="j2k", mct=True)
    plain = convert_color_space(COLOURS, "RGB", "YBR_FULL")
    for coded, stated, noted in (
        (transformed, "YBR_RCT", False),
        (transformed, "RGB", False),
        (transformed, "YBR_FULL", True),  # the codestream takes precedence
        (imagecodecs.jpeg2k_encode(plain, level=0, codecformat="j2k", mct=False), "YBR_FULL", False),
        (imagecodecs.jpeg2k_encode(plain, level=0, codecformat="jp2", mct=False), "YBR_FULL", False),
        (
            imagecodecs.jpeg2k_encode(plain, level=0, codecformat="jp2", colorspace="SYCC", mct=False),
            "YBR_FULL",
            False,
        ),
    ):
        image = shown(coded, stated, syntax=JPEG2000Lossless, **TAGS_COLOURS)
        np.testing.assert_allclose(image.pixels, COLOURS, atol=2)
        assert bool(image.notes) == noted
