"""Images stored as pixels: lossless, cheap to detect, rejected if the size does not match."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
from data_worlds import build, config, film, same, take, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vilam3_jax.data import decoded_images
from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.images import decode_image, decode_scaled, encode_png, image_shape
from vilam3_jax.data.render import ImageReader
from vilam3_jax.errors import UserError


def noise(seed: int, height: int, width: int, grey: bool = False) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return np.repeat(image[..., :1], 3, axis=-1) if grey else image


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_nothing_is_lost(seed: int, height: int, width: int, grey: bool) -> None:
    image = noise(seed, height, width, grey)
    data = decoded_images.encode(image)
    assert decoded_images.is_decoded(data) and decoded_images.shape(data) == (height, width)
    found = decoded_images.decode(data)
    assert found.dtype == np.uint8 and np.array_equal(found, image)
    assert np.array_equal(decode_image(data), image) and image_shape(data) == (height, width)
    # The format, read without this module.
    channels = 1 if grey or (image == image[..., :1]).all() else 3
    rows = np.frombuffer(imagecodecs.zstd_decode(data[10:]), np.uint8).reshape(height, width, channels)
    assert np.array_equal(np.cumsum(rows, axis=1, dtype=np.uint8), image[..., :channels])


def test_grey_takes_a_third() -> None:
    grey, colour = (decoded_images.encode(noise(0, 64, 64, grey=grey)) for grey in (True, False))
    assert len(grey) < 0.4 * len(colour)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4097, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"image is uint8|sides are from 1"):
        decoded_images.encode(wrong)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_damage_is_named_or_harmless(place: int, change: bytes) -> None:
    data = decoded_images.encode(noise(1, 12, 10))
    place %= len(data)
    damaged = data[:place] + change + data[place + len(change) :]
    if damaged[:4] != data[:4]:
        assert not decoded_images.is_decoded(damaged)
        return
    for broken in (damaged, data[:place]):
        if decoded_images.is_decoded(broken):
            try:
                assert decoded_images.decode(broken).nbytes <= 12 * 4096 * 3
            except UserError as error:
                assert "prepare the dataset again" in str(error)


def test_a_stream_that_is_longer_than_it_says_is_refused() -> None:
    """Zeros compress to almost nothing; the header bounds the decompressed size."""
    data = decoded_images.encode(noise(1, 4, 4))[:10] + imagecodecs.zstd_encode(bytes(100 << 20))
    with pytest.raises(UserError, match=r"damaged|cut short"):
        decoded_images.decode(data)
    with pytest.raises(UserError, match="version 9, not 1"):
        decoded_images.decode(data[:4] + b"\x09" + data[5:])


def test_a_size_of_another_model_is_refused() -> None:
    data = decoded_images.encode(noise(1, 8, 8))
    assert np.array_equal(decode_scaled(data, 8), decoded_images.decode(data))
    with pytest.raises(
        UserError, match=r"stored as 8 x 8 pixels, the model takes 16 x 16.*--decode-images 16"
    ):
        ImageReader(16).read(ImageRef(data=data), None)
    with pytest.raises(UserError, match=r"takes images in their original shape.*without --decode-images"):
        ImageReader(None).read(ImageRef(data=data), None)


def test_batches_are_those_of_the_files(tmp_path) -> None:
    """Images stored as pixels give the same batches as their files, except for expert overlays."""
    rng = np.random.default_rng(0)
    files = [encode_png(noise(i, 20 + i, 31, grey=bool(i % 2))) for i in range(9)]
    pixels = [decoded_images.encode(decode_scaled(file, 8)) for file in files]
    turns = [film(i, rng).turns for i in range(9)]
    found = []
    for name, images in (("files", files), ("pixels", pixels)):
        examples = [
            Example(f"e{i}", "conversation", (ImageRef(data=data),), turns[i])
            for i, data in enumerate(images)
        ]
        write(tmp_path / name / "films", examples)
        loader = build(config(tmp_path / name))
        found.append(take(loader, 4))
        loader.close()
        assert not loader.stats.skipped
    assert same(*found)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_grey_in_three_channels_is_scaled_as_one_to_the_bit(equal: bool, form: str) -> None:
    image = noise(3, 50, 41, grey=True)
    if not equal:
        image[49, 40, 2] ^= 255  # the last pixel alone
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    whole = decode_image(buffer.getvalue())
    expected = np.asarray(Image.fromarray(whole).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(decode_scaled(buffer.getvalue(), 16), expected)
