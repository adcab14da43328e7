"""Decoding of user images to 8-bit RGB, resizing and augmentation."""

from __future__ import annotations

import io
import struct
import warnings

import imagecodecs
import numpy as np
import pydicom
import pytest
from image_files import FRAMES, FULL, RAMP, RGB, chunk, deep_png, encoded, few_bits_png, turned
from PIL import Image, ImageSequence
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.images import (
    augment,
    decode_image,
    decode_scaled,
    encode_png,
    image_shape,
    load_image,
    load_pixels,
    resize,
)
from vilam3_jax.errors import InputWarning, UserError


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_scaling_while_decoding_changes_no_bit(mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 57, 3), np.uint8)).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for data in (encoded(image, form), encoded(image, form, exif=exif)):
        for size in (16, 40, 64):
            assert np.array_equal(decode_scaled(data, size), resize(decode_image(data), size))
        assert image_shape(data) == decode_image(data).shape[:2]
    for function in (image_shape, lambda data: decode_scaled(data, 8)):
        with pytest.raises(UserError, match="text file"):
            function(b"junk")


def test_png_round_trip_and_key():
    again = decode_image(encode_png(RGB))
    np.testing.assert_array_equal(again, RGB)
    as_bmp = decode_image(encoded(Image.fromarray(RGB), "BMP"))
    assert image_key(as_bmp) == image_key(RGB)
    other = RGB.copy()
    other[0, 0, 0] ^= 1
    keys = {image_key(x) for x in (RGB, other, RGB.reshape(7, 9, 3), RGB[::-1])}
    assert len(keys) == 4


def test_grey_palette_and_cmyk():
    grey = RGB[..., 0]
    np.testing.assert_array_equal(
        decode_image(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, -1)
    )
    palette = Image.fromarray(RGB).quantize(8)
    np.testing.assert_array_equal(decode_image(encoded(palette)), np.asarray(palette.convert("RGB")))
    cmyk = decode_image(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"))
    assert cmyk[0, 0].tolist() == [255, 0, 0]


def test_twelve_bit_grey_is_stretched_in_every_layout():
    with_marker = RAMP.copy()
    with_marker[0, 0] = 65535  # burnt in
    plain = decode_image(deep_png(RAMP))
    assert plain.min() == 0 and plain.max() == 255
    assert (np.diff(plain[..., 0].reshape(-1).astype(int)) >= 0).all()
    for same in (
        np.concatenate([RAMP, FULL], -1),
        np.repeat(RAMP, 3, -1),
        np.concatenate([np.repeat(RAMP, 3, -1), FULL], -1),
    ):
        np.testing.assert_array_equal(decode_image(deep_png(same)), plain)
    np.testing.assert_array_equal(decode_image(deep_png(RAMP, chunk(b"sBIT", b"\x0c"))), plain)
    marked = decode_image(deep_png(with_marker)).astype(int)
    assert np.abs(marked - plain)[1:].max() <= 1
    buffer = encoded(Image.fromarray(RAMP[..., 0]))
    np.testing.assert_array_equal(decode_image(buffer), plain)


def test_sparse_and_constant_deep_grey():
    sparse = np.zeros((40, 40, 1), np.uint16)
    sparse[3, 4], sparse[5, 6] = 1000, 2000
    grey = decode_image(deep_png(sparse))[..., 0]
    assert grey[5, 6] == 255 and grey[3, 4] == 127 and grey.sum() == 382
    for value, shown in ((0, 0), (65535, 255), (200, 200), (4095, 255)):
        assert (decode_image(deep_png(np.full((3, 3, 1), value, np.uint16))) == shown).all()


@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
def test_deep_colour_is_divided_by_one_full_scale(depth):
    colours = np.random.default_rng(1).integers(0, 256, (30, 30, 3))
    stored = np.rint(colours * (2**depth - 1) / 255).astype(np.uint16)
    np.testing.assert_array_equal(decode_image(deep_png(stored)), colours)
    stored[0, 0] = 65535  # one hot pixel does not darken the rest
    np.testing.assert_array_equal(decode_image(deep_png(stored))[1:], colours[1:])


def test_little_colour_on_black_keeps_its_hue():
    colours = np.zeros((40, 40, 3), np.uint16)
    colours[1, 1], colours[2, 2] = (51 * 257, 0, 255 * 257), (257, 2 * 257, 0)
    np.testing.assert_array_equal(decode_image(deep_png(colours)), colours // 257)


def test_a_smaller_full_scale_than_that_of_the_file_is_said():
    colours = np.random.default_rng(1).integers(0, 4096, (30, 30, 3)).astype(np.uint16)
    with pytest.warns(InputWarning, match="colours of 16 bits with values up to 40.*4095 is used"):
        decode_image(deep_png(colours))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(deep_png(colours * 16))


def test_transparency_of_sixteen_bits():
    key = chunk(b"tRNS", struct.pack(">H", int(RAMP[7, 7, 0])))
    out = decode_image(deep_png(RAMP, key))[..., 0]
    assert out[7, 7] == 255 and out[7, 6] < 250
    colours = np.random.default_rng(1).integers(0, 256, (30, 30, 3)).astype(np.uint16) * 257
    key = chunk(b"tRNS", struct.pack(">3H", *colours[2, 3]))
    out = decode_image(deep_png(colours, key))
    assert (out[2, 3] == 255).all()
    np.testing.assert_array_equal(out[3:], colours[3:] // 257)
    half = np.concatenate([np.zeros_like(colours), np.full((30, 30, 1), 32768, np.uint16)], -1)
    half[0, :, :3] = 65535
    out = decode_image(deep_png(half))
    assert (out[0] == 255).all() and (out[1:] == 127).all()


def test_transparent_is_white_paper():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[:4, :, 3], rgba[4:8, :, 3] = 0, 255
    share = rgba[..., 3:] / 255
    on_white = np.rint(rgba[..., :3] * share + 255 * (1 - share))
    for form in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        data = encoded(Image.fromarray(rgba), form, **options)
        np.testing.assert_array_equal(decode_image(data), on_white)
        ignored = decode_image(data, alpha="ignore")
        np.testing.assert_array_equal(ignored, rgba[..., :3])
        np.testing.assert_array_equal(decode_scaled(data, 16, alpha="ignore"), rgba[..., :3])
    grey = Image.fromarray(rgba).convert("LA")
    out = decode_image(encoded(grey))
    assert (out[:4] == 255).all()
    np.testing.assert_array_equal(out[4:8, :, 0], np.asarray(grey)[4:8, :, 0])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_ignored_alpha_is_what_vila_sees(mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)).convert(mode)
    keys = {"1": 0, "L": image.getpixel((1, 1)), "P": b"\0\x80\xff", "RGB": image.getpixel((1, 1))}
    options = {"transparency": keys[mode]} if mode in keys else {}
    data = encoded(image, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow advises against this conversion
        by_pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode_image(data, alpha="ignore"), by_pillow)
    assert not np.array_equal(decode_image(data), by_pillow)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_transparent_grey_of_few_bits(depth):
    values = np.arange(16, dtype=np.uint8).reshape(2, 8) % 2**depth
    key = 2**depth - 2  # not white itself
    out = decode_image(few_bits_png(values, depth, 0, chunk(b"tRNS", struct.pack(">H", key))))[..., 0]
    expected = np.where(values == key, 255, values * (255 // (2**depth - 1)))
    np.testing.assert_array_equal(out, expected)


def test_transparent_palette_entries():
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
    values = np.array([[0, 1, 2, 1]], np.uint8)
    out = decode_image(few_bits_png(values, 2, 3, palette, chunk(b"tRNS", b"\0\xff")))
    assert out[0].tolist() == [[255] * 3, [40, 50, 60], [70, 80, 90], [40, 50, 60]]


def test_images_that_are_transparent_everywhere_are_noted(tmp_path):
    path = tmp_path / "blank.png"
    path.write_bytes(encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 0))))
    with pytest.warns(InputWarning, match=r"blank\.png: the image is fully transparent"):
        assert (load_pixels(path) == 255).all()
    path.write_bytes(deep_png(np.concatenate([RAMP, 0 * RAMP], axis=-1)))
    with pytest.warns(InputWarning, match=r"blank\.png: the image is fully transparent"):
        assert (load_pixels(path) == 255).all()
    np.testing.assert_array_equal(
        decode_image(path.read_bytes(), alpha="ignore"), decode_image(deep_png(RAMP))
    )
    # Windows ignores an alpha channel of zeros.
    head = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 138, 0, 0, 122, 108, 2, 2, 1, 32, 3, 16, 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    bmp = head + masks + bytes([1, 2, 3, 0] * 4)
    with pytest.warns(InputWarning, match="BMP is fully transparent"):
        assert decode_image(bmp)[0, 0].tolist() == [3, 2, 1]


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = turned(RGB, orientation)
    stated = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    files = [
        encoded(Image.fromarray(RGB), "PNG", exif=exif),
        encoded(Image.fromarray(RGB), "WEBP", exif=exif, lossless=True),
        deep_png(RGB.astype(np.uint16) * 257, stated),
        deep_png(RGB.astype(np.uint16) * 257, after=stated),
    ]
    for data in files:
        np.testing.assert_array_equal(decode_image(data), expected)
        assert image_shape(data) == expected.shape[:2]
    with_alpha = np.concatenate([RGB, np.full_like(RGB[..., :1], 255)], -1).astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_image(deep_png(with_alpha, stated)), expected)
    jpeg = encoded(Image.fromarray(RGB), "JPEG", exif=exif)
    plain = decode_image(encoded(Image.fromarray(RGB), "JPEG"))
    np.testing.assert_array_equal(decode_image(jpeg), turned(plain, orientation))
    grey = decode_image(deep_png(RAMP, stated))
    np.testing.assert_array_equal(grey, turned(decode_image(deep_png(RAMP)), orientation))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_damaged_exif_data_are_noted(form):
    data = encoded(Image.fromarray(RGB), form, exif=b"Exif\0\0no header at all")
    with pytest.warns(InputWarning, match="EXIF data are damaged"):
        assert decode_image(data).shape == RGB.shape


@pytest.mark.parametrize("lossless", [False, True])
def test_jpegs_of_more_than_eight_bits(lossless):
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint16) * 32
    data = imagecodecs.jpeg_encode(ramp, bitspersample=12, lossless=lossless, level=None if lossless else 98)
    grey = decode_image(data)[..., 0]
    expected = (ramp - ramp.min()) / np.ptp(ramp) * 255
    assert np.abs(grey - expected).max() < 12 and image_shape(data) == (64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()
    body = b"Exif\0\0" + body.removeprefix(b"Exif\0\0")
    turned_data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    np.testing.assert_array_equal(decode_image(turned_data), np.rot90(decode_image(data), -1))
    with pytest.raises(UserError, match="cut short"):
        decode_image(data[: len(data) // 2])
    colours = np.stack([ramp, ramp[::-1], ramp.T[:, ::-1]], -1)
    out = decode_image(imagecodecs.jpeg_encode(colours, bitspersample=12, level=98))
    assert np.abs(out - colours / 4095 * 255).mean() < 2


def test_cmyk_jpegs_with_and_without_adobes_marker():
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    adobe = encoded(inks, "JPEG", quality=95)
    assert b"Adobe" in adobe and np.abs(decode_image(adobe)[8, 8].astype(int) - [255, 0, 0]).max() < 8
    place = adobe.find(b"Adobe") - 4
    length = int.from_bytes(adobe[place + 2 : place + 4], "big")
    plain = (
        adobe[:place] + adobe[place + 2 + length :]
    )  # its samples are ink, not inverted: 255 - (0, 255, 255, 0)
    expected = np.asarray(Image.new("CMYK", (1, 1), (255, 0, 0, 255)).convert("RGB"))[0, 0]
    assert np.abs(decode_image(plain)[8, 8].astype(int) - expected).max() < 8


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_are_refused_or_a_frame_is_chosen(form, tmp_path):
    data = encoded(
        FRAMES[0],
        form,
        save_all=True,
        append_images=FRAMES[1:],
        **({} if form == "GIF" else {"lossless": True}),
    )
    with pytest.raises(UserError, match=rf"{form} animation of 3 frames; choose one \(0 to 2\)"):
        decode_image(data)
    with pytest.raises(UserError, match="3 frames"):
        image_shape(data)
    by_pillow = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(io.BytesIO(data)))]
    for number, frame in enumerate(by_pillow):
        np.testing.assert_array_equal(decode_image(data, frame=number), np.asarray(frame))
    with pytest.raises(UserError, match="no number 3"):
        decode_image(data, frame=3)
    path = tmp_path / "cine"
    path.write_bytes(data)
    image = load_image(path, frame=1)
    assert (image.frame, image.frames, image.modality) == (1, 3, "unknown")


def test_one_image_is_frame_0():
    assert decode_image(encoded(FRAMES[0], "GIF"), frame=0)[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(UserError, match="no number 1 among its 1 frames"):
        decode_image(encoded(FRAMES[0]), frame=1)
    photo = encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:])  # a phone's, with previews
    assert Image.open(io.BytesIO(photo)).n_frames == 3
    assert decode_image(photo).shape == (6, 8, 3)


def test_transparent_gif():
    data = encoded(Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P"), "GIF", transparency=0)
    out = decode_image(data)
    assert out[0, 0].tolist() == [255] * 3 and out[0, 1].tolist() != [255] * 3


def test_resize_is_pil_bicubic_without_aspect_ratio():
    out = resize(RGB, 16)
    expected = np.asarray(Image.fromarray(RGB).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(resize(RGB[:7], 7), RGB[:7])


def save_film(path, raw, photometric="MONOCHROME1", **more):
    d = pydicom.Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID, d.SOPInstanceUID = ComputedRadiographyImageStorage, generate_uid()
    d.Rows, d.Columns, d.SamplesPerPixel = *raw.shape, 1
    d.PhotometricInterpretation, d.PixelRepresentation = photometric, 0
    d.BitsAllocated, d.BitsStored, d.HighBit = 16, 15, 14
    d.PixelData = raw.astype("<u2").tobytes()
    for key, value in more.items():
        setattr(d, key, value)
    d.save_as(path, enforce_file_format=True)
    return path


def test_film_of_inverted_grey_is_turned(tmp_path):
    ramp = np.linspace(0, 20000, 48).reshape(6, 8)
    bright_last = load_pixels(save_film(tmp_path / "m2.dcm", ramp, "MONOCHROME2"))
    bright_first = load_pixels(save_film(tmp_path / "m1.dcm", ramp, "MONOCHROME1"))
    assert bright_last.shape == (6, 8, 3) and bright_last.dtype == np.uint8
    assert bright_last[0, 0, 0] == 0 and bright_last[-1, -1, 0] == 255
    np.testing.assert_array_equal(bright_first, 255 - bright_last)


def test_film_window_and_many_frames(tmp_path):
    ramp = np.linspace(0, 20000, 48).reshape(6, 8)
    path = save_film(tmp_path / "w.dcm", ramp, "MONOCHROME2", WindowCenter=[5000, 1], WindowWidth=[2000, 1])
    grey = load_pixels(path)[..., 0]
    assert (grey[ramp <= 4000] == 0).all() and (grey[ramp >= 6000] == 255).all()
    assert 0 < grey[(ramp > 4000) & (ramp < 6000)].mean() < 255
    with pytest.raises(UserError, match=r"cine\.dcm: 96 bytes of pixel data"):
        load_pixels(save_film(tmp_path / "cine.dcm", ramp, NumberOfFrames=2))
    cut = save_film(tmp_path / "cut.dcm", ramp, PixelData=b"\0\0")
    with pytest.raises(UserError, match=r"cut\.dcm: 2 bytes of pixel data"):
        load_pixels(cut)


def test_film_files_that_are_images(tmp_path):
    path = tmp_path / "film.png"
    path.write_bytes(encode_png(RGB))
    np.testing.assert_array_equal(load_pixels(path), RGB)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match=r"film\.png"):
        load_pixels(path)


def test_augment_treats_the_images_of_a_sample_alike_and_keeps_sides():
    """Left stays left in every draw, and equal images stay equal."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[8:56, 8:56] = 60
    image[24:40, 12:24] = 250  # a bright block in the left half only
    seen = set()
    for seed in range(50):
        first, second = augment([image, image], np.random.default_rng(seed))
        np.testing.assert_array_equal(first, second)
        assert first.dtype == np.uint8 and first.shape == image.shape
        bright = np.argwhere(first[..., 0] > 0.6 * first.max())
        assert abs(bright[:, 1].mean() - 17.5) < 10 and abs(bright[:, 0].mean() - 31.5) < 10
        assert not first[0, 0].any()  # black stays black
        seen.add(first.tobytes())
    assert len(seen) == 50


def test_augment_is_repeatable():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    draws = [augment([image], np.random.default_rng((7, 3)))[0] for _ in range(2)]
    np.testing.assert_array_equal(*draws)
