"""TIFF images: written by tifffile, Pillow or by hand, and compared with the arrays they were made of."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from vilam3_jax.data.images import decode_image, image_shape
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import InputWarning, UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 33, 3)).astype(np.uint8)
GREY = RGB[..., 0]
RAMP = np.linspace(0, 4095, 20 * 33).round().astype(np.uint16).reshape(20, 33)  # 12 bits in 16


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def by_hand(width: int, height: int, pixels: bytes, order: str = "<", **tags) -> bytes:
    """A TIFF of one strip with only the given tags (name=(code, values))."""
    entries = {256: (width,), 257: (height,), 259: (1,), 278: (height,), 279: (len(pixels),)}
    entries |= dict(tags.values())
    entries[273] = (8,)
    body = b"II*\0" if order == "<" else b"MM\0*"
    ifd, extra = b"", b""
    place = 8 + len(pixels) + len(pixels) % 2
    after = place + 2 + 12 * len(entries) + 4
    for code, values in sorted(entries.items()):
        kind, packed = ("I", 4) if max(values) > 65535 else ("H", 3)
        packed_values = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(packed_values) > 4:
            pointer = struct.pack(f"{order}I", after + len(extra))
            extra += packed_values
        else:
            pointer = packed_values.ljust(4, b"\0")
        ifd += struct.pack(f"{order}HHI", code, packed, len(values)) + pointer
    body += struct.pack(f"{order}I", place) + pixels + b"\0" * (len(pixels) % 2)
    return body + struct.pack(f"{order}H", len(entries)) + ifd + struct.pack(f"{order}I", 0) + extra


def bits(*values: int) -> tuple[int, tuple[int, ...]]:
    return 258, values


def photometric(value: int) -> tuple[int, tuple[int]]:
    return 262, (value,)


def samples(count: int) -> tuple[int, tuple[int]]:
    return 277, (count,)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize("layout", ["contig", "separate", "tiled", "big"])
def test_rgb_in_every_layout(compression, layout):
    array = np.moveaxis(RGB, -1, 0) if layout == "separate" else RGB
    options = {"tile": (16, 16)} if layout == "tiled" else {"rowsperstrip": 7}
    data = tiff(
        array,
        photometric="rgb",
        planarconfig="separate" if layout == "separate" else "contig",
        bigtiff=layout == "big",
        byteorder=">" if layout == "big" else "<",
        compression=compression,
        predictor=compression in ("lzw", "zlib"),
        **options,
    )
    np.testing.assert_array_equal(decode_image(data), RGB)
    assert image_shape(data) == (20, 33)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_min_is_white_is_inverted_once_at_every_depth(order, white_is_zero):
    name = "miniswhite" if white_is_zero else "minisblack"
    eight = decode_image(tiff(GREY, photometric=name, byteorder=order))
    np.testing.assert_array_equal(eight, as_rgb(255 - GREY if white_is_zero else GREY))
    deep = decode_image(tiff(RAMP, photometric=name, byteorder=order))[..., 0]
    assert (np.diff(deep.reshape(-1).astype(int)) * (-1 if white_is_zero else 1) >= 0).all()
    assert deep.min() == 0 and deep.max() == 255
    one = RNG.integers(0, 2, (9, 21)).astype(bool)
    bilevel = decode_image(tiff(one, photometric=name, byteorder=order))
    np.testing.assert_array_equal(bilevel[..., 0] == 255, ~one if white_is_zero else one)


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_fax(compression):
    page = Image.fromarray(GREY > 127)
    buffer = io.BytesIO()
    page.save(buffer, "TIFF", compression=compression)
    np.testing.assert_array_equal(decode_image(buffer.getvalue())[..., 0] == 255, GREY > 127)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("depth", [2, 4])
def test_few_bits_use_their_full_scale(order, depth):
    values = RNG.integers(0, 2**depth, (4, 8)).astype(np.uint8)
    packed = imagecodecs.packints_encode(values.reshape(-1), depth)
    data = by_hand(8, 4, packed, order, b=bits(depth), p=photometric(1))
    np.testing.assert_array_equal(decode_image(data), as_rgb(values * (255 // (2**depth - 1))))


@pytest.mark.parametrize("depth", [10, 12, 14])
def test_packed_deep_grey_is_stretched_like_unpacked(depth):
    values = (np.arange(64 * 8) * (2**depth - 1) // 511).astype(np.uint16).reshape(8, 64)
    packed = imagecodecs.packints_encode(values.reshape(-1), depth)
    data = by_hand(64, 8, packed, b=bits(depth), p=photometric(1))
    np.testing.assert_array_equal(decode_image(data), decode_image(tiff(values)))
    grey = decode_image(data)[..., 0].reshape(-1)
    assert grey[0] == 0 and grey[-1] == 255 and (np.diff(grey.astype(int)) >= 0).all()


@pytest.mark.parametrize("dtype", ["i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8", "u8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_of_any_number_type_shows_its_own_range(dtype, order):
    values = np.linspace(-120 if np.dtype(dtype).kind != "u" else 0, 120, 330).astype(dtype).reshape(10, 33)
    grey = decode_image(tiff(values, photometric="minisblack", byteorder=order))[..., 0]
    assert grey.min() == 0 and grey.max() == 255
    expected = (values.astype(float) - values.min()) / float(np.ptp(values.astype(float))) * 255
    assert np.abs(grey - expected).max() < 4  # the percentiles cut half a per cent on either side


def test_floats_that_measure_nothing_do_not_count():
    values = np.linspace(0, 1, 400).astype(np.float32).reshape(20, 20)
    clean = decode_image(tiff(values))
    values[0, :3] = np.nan, np.inf, -np.inf
    grey = decode_image(tiff(values))
    assert grey[0, 0, 0] == 0 and grey[0, 1, 0] == 255 and grey[0, 2, 0] == 0
    assert np.abs(grey[1:].astype(int) - clean[1:]).max() <= 2
    with pytest.raises(UserError, match="without any finite pixel"):
        decode_image(tiff(np.full((4, 4), np.nan, np.float32)))
    huge = np.linspace(0, 1, 400).reshape(20, 20)
    huge[0, 0] = 1e300  # float64 only
    assert np.abs(decode_image(tiff(huge))[1:].astype(int) - clean[1:]).max() <= 2


def test_sixteen_bit_colour_equals_its_eight_bit_version():
    wide = RGB.astype(np.uint16) * 257
    for order in "<>":
        np.testing.assert_array_equal(decode_image(tiff(wide, photometric="rgb", byteorder=order)), RGB)
    share = (RGB / 255).astype(np.float32)
    np.testing.assert_array_equal(decode_image(tiff(share, photometric="rgb")), RGB)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_alpha_and_other_extra_samples(dtype):
    full = np.iinfo(dtype).max
    scale = full // 255
    alpha = RNG.integers(0, 256, RGB.shape[:2]).astype(np.uint8)
    alpha[:4], alpha[4:8] = 0, 255
    colours = RGB.copy()
    colours[8] = 255  # so that the full scale is found
    whole = np.concatenate([colours, alpha[..., None]], -1).astype(dtype) * scale
    share = alpha[..., None] / 255.0
    on_white = np.rint(colours * share + 255 * (1 - share))
    shown = decode_image(tiff(whole, photometric="rgb", extrasamples=["unassalpha"]))
    assert np.abs(shown - on_white).max() <= 1
    assert (shown[:4] == 255).all()
    np.testing.assert_array_equal(shown[4:8], colours[4:8])

    stored = np.rint(whole[..., :3] * share).astype(dtype)  # multiplied by alpha
    stored = np.concatenate([stored, whole[..., 3:]], -1)
    shown = decode_image(tiff(stored, photometric="rgb", extrasamples=["assocalpha"]))
    assert np.abs(shown - on_white).max() <= 1

    depth, order = whole.itemsize * 8, "<"
    raw = whole.astype(whole.dtype.newbyteorder(order)).tobytes()
    tags = {"b": bits(*[depth] * 4), "p": photometric(2), "s": samples(4)}
    for extra in ({"e": (338, (0,))}, {}):  # a fourth sample not declared as alpha
        data = by_hand(RGB.shape[1], RGB.shape[0], raw, order, **tags, **extra)
        with pytest.warns(InputWarning, match="1 of 4 samples of each pixel have no stated meaning"):
            np.testing.assert_array_equal(decode_image(data), colours)
    ignored = decode_image(tiff(whole, photometric="rgb", extrasamples=["unassalpha"]), alpha="ignore")
    np.testing.assert_array_equal(ignored[4:8], colours[4:8])


def test_grey_with_alpha():
    pair = np.stack([RAMP, np.full_like(RAMP, 65535)], -1)
    pair[0, :, 1] = 0
    pair[0, :, 0] = 65535  # hidden, so it must not darken the rest
    shown = decode_image(tiff(pair, photometric="minisblack", extrasamples=["unassalpha"]))
    assert (shown[0] == 255).all()
    np.testing.assert_array_equal(shown[1:], decode_image(tiff(RAMP[1:])))


def test_palettes():
    table = RNG.integers(0, 256, (3, 256)).astype(np.uint16)
    for stored in (table * 257, table):  # some programs write 8 bits
        data = tiff(GREY, photometric="palette", colormap=stored)
        np.testing.assert_array_equal(decode_image(data), table.T[GREY])
    with pytest.raises(UserError, match="damaged"):
        decode_image(by_hand(2, 1, b"\0\x09", b=bits(8), p=photometric(3), c=(320, (1, 2, 3) * 2)))


def test_other_colour_spaces():
    inks = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    buffer = io.BytesIO()
    inks.save(buffer, "TIFF")
    assert decode_image(buffer.getvalue())[0, 0].tolist() == [255, 0, 0]
    deep = np.asarray(inks).astype(np.uint16) * 257
    assert decode_image(tiff(deep, photometric="separated"))[0, 0].tolist() == [255, 0, 0]
    smooth = Image.fromarray(RGB[:4, :4]).resize((64, 64), Image.Resampling.BICUBIC)
    for mode in ("YCbCr", "LAB"):
        buffer = io.BytesIO()
        (smooth.convert(mode) if mode == "YCbCr" else Image.new("LAB", (64, 64), (180, 150, 110))).save(
            buffer, "TIFF"
        )
        with Image.open(buffer) as by_pillow:
            np.testing.assert_array_equal(decode_image(buffer.getvalue()), by_pillow.convert("RGB"))
    buffer = io.BytesIO()
    Image.new("LAB", (64, 64), (180, 150, 110)).save(buffer, "TIFF", compression="jpeg")
    with pytest.raises(UserError, match=r"L\*a\*b\* colours with JPEG"):
        decode_image(buffer.getvalue())
    for options in ({"tile": (32, 32)}, {"rowsperstrip": 16}):
        data = tiff(np.asarray(smooth), photometric="rgb", compression="jpeg", **options)  # YCbCr inside
        np.testing.assert_array_equal(decode_image(data), tifffile.imread(io.BytesIO(data)))
        assert np.abs(decode_image(data).astype(int) - np.asarray(smooth)).mean() < 12
    with pytest.raises(UserError, match="inks other than CMYK"):
        decode_image(tiff(np.asarray(inks), photometric="separated", extratags=[(332, 3, 1, 2, True)]))


@pytest.mark.parametrize("orientation", [0, *range(1, 10)])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_the_orientation_is_applied_once(orientation, dtype, compression):
    array = RGB.astype(dtype) * (np.iinfo(dtype).max // 255)
    data = tiff(array, photometric="rgb", compression=compression, extratags=[(274, 3, 1, orientation, True)])
    turned = {
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB),
    }.get(orientation, RGB)
    np.testing.assert_array_equal(decode_image(data), turned)
    assert image_shape(data) == turned.shape[:2]


def test_pages_are_refused_or_chosen():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(RGB, photometric="rgb")
        writer.write(RGB[:5, :5], photometric="rgb", subfiletype=1)  # a thumbnail
        writer.write(255 - RGB, photometric="rgb")
        writer.write(GREY > 9, photometric="minisblack", subfiletype=4)  # a mask
    data = buffer.getvalue()
    with pytest.raises(UserError, match=r"TIFF image of 2 pages; choose one \(0 to 1\)"):
        decode_image(data)
    with pytest.raises(UserError, match="2 pages"):
        image_shape(data)
    np.testing.assert_array_equal(decode_image(data, frame=0), RGB)
    np.testing.assert_array_equal(decode_image(data, frame=1), 255 - RGB)
    for wrong in (2, -1):
        with pytest.raises(UserError, match=f"no number {wrong} among its 2 pages"):
            decode_image(data, frame=wrong)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(RGB, photometric="rgb")
        writer.write(RGB[:5, :5], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), RGB)
    np.testing.assert_array_equal(decode_image(tiff(RGB, photometric="rgb", subfiletype=1)), RGB)


@pytest.mark.parametrize("options", [{"imagej": True}, {"metadata": {"axes": "ZYX"}}])
def test_stacks_behind_one_page(options):
    stack = np.zeros((4, 8, 8), np.uint8)
    with pytest.raises(UserError, match="4 pages"):
        decode_image(tiff(stack, photometric="minisblack", **options))
    for frame in (None, 0):
        with pytest.raises(UserError, match="only some of its planes"):
            decode_image(tiff(stack, photometric="minisblack", truncate=True, **options), frame=frame)


def test_predictors_of_floats_and_a_strip_of_unstated_length():
    values = np.linspace(0, 1, 660).astype(np.float32).reshape(20, 33)
    np.testing.assert_array_equal(
        decode_image(tiff(values, compression="zlib", predictor=True)), decode_image(tiff(values))
    )
    data = by_hand(33, 20, GREY.tobytes(), b=bits(8), p=photometric(1), n=(279, (0,)))
    np.testing.assert_array_equal(decode_image(data), as_rgb(GREY))


def test_what_the_file_does_not_say_is_noted():
    with pytest.warns(InputWarning, match="0 is black or white"):
        assert decode_image(by_hand(2, 1, b"\x01\x02", b=bits(8)))[0, :, 0].tolist() == [1, 2]
    with pytest.warns(InputWarning, match="RGB is assumed"):
        data = by_hand(1, 1, b"\x01\x02\x03", b=bits(8, 8, 8), s=samples(3))
        assert decode_image(data)[0, 0].tolist() == [1, 2, 3]


def test_layouts_that_are_not_read_are_named():
    for data, reason in (
        (by_hand(2, 2, bytes(4), b=bits(8), p=photometric(32803)), "raw photo of a camera"),
        (by_hand(2, 2, bytes(8), b=bits(8, 8, 8), s=samples(3), p=photometric(6)), "subsampled colour"),
        (by_hand(2, 2, bytes(4), b=bits(8), p=photometric(1), c=(259, (34712,))), "compression 34712"),
        (by_hand(2, 2, bytes(8), b=bits(5, 6, 5), s=samples(3), p=photometric(2)), "-bit samples"),
        (tiff(np.zeros((2, 2), np.complex64)), "-bit samples"),
        (
            tiff(
                np.zeros((4, 16, 16), np.uint8), volumetric=True, tile=(16, 16, 16), photometric="minisblack"
            ),
            "TIFF volume of 4 slices",
        ),
        (tiff(RGB, photometric="rgb", description="Aperio Image Library"), "whole-slide"),
        (by_hand(0, 4, bytes(4), b=bits(8), p=photometric(1)), "0 x 4 pixels"),
    ):
        with pytest.raises(UserError, match=reason):
            decode_image(data)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "jpeg", "group4"])
def test_cut_short_files_are_never_half_decoded(compression):
    buffer = io.BytesIO()
    picture = Image.fromarray(GREY > 127) if compression == "group4" else Image.fromarray(RGB)
    name = {None: None, "zlib": "tiff_adobe_deflate", "lzw": "tiff_lzw"}.get(compression, compression)
    picture.save(buffer, "TIFF", compression=name)
    data = buffer.getvalue()
    whole = decode_image(data)
    np.testing.assert_array_equal(decode_image(data + b"garbage"), whole)
    for length in range(4, len(data), 61):
        try:
            out = decode_image(data[:length])
        except UserError as error:
            assert "\n" not in str(error)
        else:
            np.testing.assert_array_equal(out, whole)
    # tifffile writes the header first.
    if compression != "group4":
        data = tiff(RGB, photometric="rgb", compression=compression)
        for part in (0.6, 0.9, 0.99):
            with pytest.raises(UserError, match="cut short"):
                decode_image(data[: int(len(data) * part)])


def test_bombs_are_refused_by_their_tags(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", forbidden)
    tiny = Limits(pixels=1000, decoded_bytes=4000)
    stream = bytearray(imagecodecs.jpeg_encode(np.zeros((16, 16), np.uint8)))
    place = stream.find(b"\xff\xc0")
    stream[place + 5 : place + 9] = struct.pack(">HH", 65000, 65000)
    for data, reason in (
        (by_hand(60000, 60000, bytes(4), b=bits(8), p=photometric(1)), "60000 x 60000 pixels, more than"),
        (by_hand(30, 30, bytes(4), b=bits(8), s=samples(60000), p=photometric(1)), "bytes when decoded"),
        (
            by_hand(8, 8, bytes(4), b=bits(8), p=photometric(1), w=(322, (60000,)), h=(323, (60000,))),
            "bytes when decoded",
        ),
        (by_hand(16, 16, bytes(stream), b=bits(8), p=photometric(1), c=(259, (7,))), "damaged JPEG strip"),
        (tiff(np.zeros((9, 9), np.uint8), rowsperstrip=1)[:100], "damaged|cut short"),
    ):
        with pytest.raises(UserError, match=reason):
            decode_image(data, limits=tiny)


def test_a_strip_unpacks_to_no_more_than_its_rows():
    bomb = zlib.compress(bytes(64 << 20), 9)
    data = by_hand(8, 8, bomb, b=bits(8), p=photometric(1), c=(259, (8,)))
    with pytest.raises(UserError, match="damaged"):
        decode_image(data)


def test_many_pages_and_circles():
    page = by_hand(1, 1, b"\0", b=bits(8), p=photometric(1))
    start = struct.unpack_from("<I", page, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", page, start)[0]
    circle = page[:end] + struct.pack("<I", start) + page[end + 4 :]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            decode_image(circle)
        except UserError as error:
            assert "\n" not in str(error)
