"""Images: what users have becomes 8-bit RGB, hostile files are refused."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.images import (
    augment,
    decode_image,
    decode_scaled,
    encode_png,
    image_shape,
    load_film,
    resize,
)
from vilam3_jax.errors import UserError


def _encoded(picture: Image.Image, form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_scaling_while_decoding_changes_no_bit(mode):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 57, 3), np.uint8)).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for data in (_encoded(picture, form), _encoded(picture, form, exif=exif)):
        for size in (16, 40, 64):
            assert np.array_equal(decode_scaled(data, size), resize(decode_image(data), size))
        assert image_shape(data) == decode_image(data).shape[:2]
    with pytest.raises(UserError, match="not a readable"):
        image_shape(b"junk")
    with pytest.raises(UserError, match="not a readable"):
        decode_scaled(b"junk", 8)


def encoded(image: Image.Image, format: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)


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


def test_sixteen_bit_and_float_are_stretched_not_cut():
    ramp = np.linspace(500, 3500, 12).astype(np.uint16).reshape(3, 4)
    for data in (encoded(Image.fromarray(ramp)), encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF")):
        grey = decode_image(data)[..., 0]
        assert grey.min() == 0 and grey.max() == 255
        assert (np.diff(grey.reshape(-1).astype(int)) > 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_ignored(mode):
    rgba = np.full((2, 2, 4), 200, np.uint8)
    rgba[0, 0, 3] = 0
    out = decode_image(encoded(Image.fromarray(rgba).convert(mode)))
    assert (out == 200).all()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees
    picture = Image.fromarray(RGB)
    out = decode_image(encoded(picture, "PNG", exif=exif))
    np.testing.assert_array_equal(out, np.rot90(RGB, -1))


def test_too_many_pixels_are_refused_by_the_header():
    with pytest.raises(UserError, match="9 x 9 pixels, more than the limit of 80"):
        decode_image(encoded(Image.new("L", (9, 9))), max_pixels=80)
    # A PNG whose header says 60000 x 60000 and that holds no pixels: refused before any memory is taken.
    bomb = bytearray(encoded(Image.new("L", (9, 9))))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match=r"limit|exceeds"):
        decode_image(bytes(bomb))


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_other_files_are_refused(data):
    with pytest.raises(UserError, match="not a readable"):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*", "ignore::RuntimeWarning:PIL.*")
@settings(max_examples=60, deadline=None)
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP"]))
def test_damaged_images_give_one_error(data, format):
    raw = bytearray(encoded(Image.fromarray(RGB), format))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)))]
    try:
        out = decode_image(bytes(raw), max_pixels=1e6)
    except UserError as error:
        assert str(error)
    else:
        assert out.dtype == np.uint8 and out.shape[-1] == 3


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
    bright_last = load_film(save_film(tmp_path / "m2.dcm", ramp, "MONOCHROME2"))
    bright_first = load_film(save_film(tmp_path / "m1.dcm", ramp, "MONOCHROME1"))
    assert bright_last.shape == (6, 8, 3) and bright_last.dtype == np.uint8
    assert bright_last[0, 0, 0] == 0 and bright_last[-1, -1, 0] == 255
    np.testing.assert_array_equal(bright_first, 255 - bright_last)


def test_film_window_and_many_frames(tmp_path):
    ramp = np.linspace(0, 20000, 48).reshape(6, 8)
    path = save_film(tmp_path / "w.dcm", ramp, "MONOCHROME2", WindowCenter=[5000, 1], WindowWidth=[2000, 1])
    grey = load_film(path)[..., 0]
    assert (grey[ramp <= 4000] == 0).all() and (grey[ramp >= 6000] == 255).all()
    assert 0 < grey[(ramp > 4000) & (ramp < 6000)].mean() < 255
    with pytest.raises(UserError, match=r"cine\.dcm: not a grey DICOM image of one frame"):
        load_film(save_film(tmp_path / "cine.dcm", ramp, NumberOfFrames=2))
    cut = save_film(tmp_path / "cut.dcm", ramp, PixelData=b"\0\0")
    with pytest.raises(UserError, match=r"cut\.dcm: pixels"):
        load_film(cut)


def test_film_files_that_are_pictures(tmp_path):
    path = tmp_path / "film.png"
    path.write_bytes(encode_png(RGB))
    np.testing.assert_array_equal(load_film(path), RGB)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match=r"film\.png"):
        load_film(path)


def test_augment_treats_the_images_of_a_sample_alike_and_keeps_sides():
    """Left stays left under every draw, and two equal pictures stay equal."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[8:56, 8:56] = 60
    picture[24:40, 12:24] = 250  # a bright block in the left half only
    seen = set()
    for seed in range(50):
        first, second = augment([picture, picture], np.random.default_rng(seed))
        np.testing.assert_array_equal(first, second)
        assert first.dtype == np.uint8 and first.shape == picture.shape
        bright = np.argwhere(first[..., 0] > 0.6 * first.max())
        assert abs(bright[:, 1].mean() - 17.5) < 10 and abs(bright[:, 0].mean() - 31.5) < 10
        assert not first[0, 0].any()  # what is black stays black
        seen.add(first.tobytes())
    assert len(seen) == 50


def test_augment_is_repeatable():
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    draws = [augment([picture], np.random.default_rng((7, 3)))[0] for _ in range(2)]
    np.testing.assert_array_equal(*draws)
