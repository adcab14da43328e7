"""Damaged, truncated and hostile images are rejected with one line, within bounds of memory."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import FRAMES, RAMP, RGB, chunk, deep_png, encoded, few_bits_png
from PIL import Image

from vilam3_jax.data.images import decode_image, image_shape
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError


def test_too_many_pixels_are_refused_by_the_header():
    tiny = Limits(pixels=80)
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        data = encoded(Image.new("L", (9, 9)), form)
        for function in (decode_image, image_shape):
            with pytest.raises(UserError, match="9 x 9 pixels, more than the limit of 80"):
                function(data, limits=tiny)
    # Headers of 60000 x 60000 pixels with hardly any data are rejected before memory is allocated.
    bomb = bytearray(encoded(Image.new("L", (9, 9))))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    jpeg = bytearray(encoded(Image.new("L", (9, 9)), "JPEG"))
    place = jpeg.find(b"\xff\xc0") + 5
    jpeg[place : place + 4] = (60000).to_bytes(2, "big") * 2
    gif = bytearray(encoded(Image.new("L", (9, 9)), "GIF"))
    gif[6:10] = (60000).to_bytes(2, "little") * 2
    later = bytearray(encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]))
    place = later.rfind(b"\x2c\0\0\0\0\x08\0\x06\0")  # the last frame's descriptor
    later[place + 5 : place + 9] = (60000).to_bytes(2, "little") * 2
    webp = bytearray(encoded(Image.new("RGBA", (9, 9)), "WEBP", exif=Image.Exif()))
    webp = (
        b"RIFF"
        + webp[4:12]
        + b"VP8X"
        + struct.pack("<II", 10, 0)
        + (59999).to_bytes(3, "little") * 2
        + webp[30:]
    )
    for data in (bomb, jpeg, gif, later, webp):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match="60000 x 60000 pixels, more than the limit"):
                decode_image(bytes(data))


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_compressed_texts_of_any_size_do_no_harm(kind):
    """Pillow rejects PNGs with texts of more than 1 MiB, which Photoshop and ImageMagick write."""
    head = {b"iCCP": b"name\0\0", b"zTXt": b"name\0\0", b"iTXt": b"name\0\x01\0\0\0"}[kind]
    text = chunk(kind, head + zlib.compress(bytes(80 << 20), 9))
    plain, deep = encoded(Image.fromarray(RGB)), deep_png(RAMP)
    for data, (start, rest) in ((plain, (plain[:33], plain[33:])), (deep, (deep[:33], deep[33:]))):
        tracemalloc.start()
        out = decode_image(start + text + rest)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 20 << 20
        np.testing.assert_array_equal(out, decode_image(data))
        if kind != b"iCCP":  # iCCP must precede the pixels
            end = chunk(b"IEND", b"")
            np.testing.assert_array_equal(decode_image(data.removesuffix(end) + text + end), out)


def test_compressed_exif_data_cannot_fill_the_memory():
    text = b"Raw profile type exif\0\0" + zlib.compress(bytes(80 << 20), 9)
    data = encoded(Image.fromarray(RGB))
    with pytest.raises(UserError, match="PNG image is damaged"):
        decode_image(data[:33] + chunk(b"zTXt", text) + data[33:])
    exif = Image.Exif()
    exif[274] = 6
    hexadecimal = (b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")).hex().encode()
    profile = b"\nexif\n%8d\n%s\n" % (len(hexadecimal) // 2, hexadecimal)  # as ImageMagick writes it
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))
    np.testing.assert_array_equal(decode_image(data[:33] + text + data[33:]), np.rot90(RGB, -1))


def truncations() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 50, 3)).astype(np.uint8))
    return {
        "PNG": encoded(noise),
        "deep PNG": deep_png(np.asarray(noise).astype(np.uint16) * 257),
        "JPEG": encoded(noise, "JPEG"),
        "progressive JPEG": encoded(noise, "JPEG", progressive=True),
        "WebP": encoded(noise, "WEBP"),
        "lossless WebP": encoded(noise, "WEBP", lossless=True),
        "BMP": encoded(noise, "BMP"),
        "GIF": encoded(noise, "GIF"),
    }


@pytest.mark.parametrize("name", truncations())
def test_cut_short_files_are_never_half_decoded(name):
    data = truncations()[name]
    whole = decode_image(data)
    np.testing.assert_array_equal(decode_image(data + b"garbage" * 9), whole)
    np.testing.assert_array_equal(decode_image(data + bytes(999)), whole)
    for length in [*range(1, len(data), max(1, len(data) // 40)), *range(len(data) - 24, len(data))]:
        try:
            out = decode_image(data[:length])
        except UserError as error:
            assert "0 x 0" not in str(error)
            if length > 200:
                assert f"{name.split()[-1]} image is cut short" in str(error)
        else:
            np.testing.assert_array_equal(out, whole)
    if "JPEG" in name:
        with pytest.raises(UserError, match="cut short"):  # preallocated, but not fully written
            decode_image(data[: len(data) // 2] + bytes(len(data) // 2))


@pytest.mark.parametrize("interlaced", [False, True])
def test_png_that_ends_in_the_middle_with_all_its_marks(interlaced):
    pixels = np.random.default_rng(0).integers(1, 256, (13, 11)).astype(np.uint8)
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    parts = [pixels[y::dy, x::dx] for x, y, dx, dy in passes] if interlaced else [pixels]
    rows = [b"\0" + row.tobytes() for part in parts for row in part]

    def png(rows):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 11, 13, 8, 0, 0, 0, int(interlaced)))
        packed = zlib.compress(b"".join(rows))
        data = b"".join(chunk(b"IDAT", packed[i : i + 9]) for i in range(0, len(packed), 9))
        return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")

    np.testing.assert_array_equal(decode_image(png(rows))[..., 0], pixels)
    for count in (1, 2, len(rows) - 1):
        with pytest.raises(UserError, match=r"cut short|damaged"):
            decode_image(png(rows[:count]))
    pixels[-1] = 0  # looks like a missing row
    rows = [b"\0" + row.tobytes() for part in parts for row in part]
    np.testing.assert_array_equal(decode_image(png(rows))[..., 0], pixels)


def test_png_without_its_palette():
    values = np.array([[0, 1, 2, 1]], np.uint8)
    with pytest.raises(UserError, match="without its palette"):
        decode_image(few_bits_png(values, 2, 3))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty file"),
        (b"hello", "text file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (bytes(128) + b"DICM", "DICOM file, not an image"),
    ],
)
def test_other_files_are_refused(data, words):
    with pytest.raises(UserError, match=words):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*", "ignore::RuntimeWarning:PIL.*")
@settings(max_examples=60, deadline=None)
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "deep"]))
def test_damaged_images_give_one_error(data, format):
    raw = bytearray(deep_png(RAMP) if format == "deep" else encoded(Image.fromarray(RGB), format))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)))]
    try:
        out = decode_image(bytes(raw), limits=Limits(pixels=1_000_000))
    except UserError as error:
        assert str(error) and "\n" not in str(error) and " 0x" not in str(error)
    else:
        assert out.dtype == np.uint8 and out.shape[-1] == 3
