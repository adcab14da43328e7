"""Decoding and resizing of images against PIL and transformers' SiglipImageProcessor, to one uint8 level."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.data.images import decode_image
from vilam3_jax.models import model_config

SIZE = 98
SHAPES = [(37, 211), (240, 101), (98, 98), (1, 64), (300, 299)]  # height, width
COLOURS = {"L": "PNG", "RGB": "PNG", "RGBA": "PNG", "LA": "PNG", "P": "PNG", "1": "PNG", "CMYK": "TIFF"}


def model(mode, tower="siglip"):
    sizes = dict(image_size=SIZE, patch_size=14, hidden_size=8, num_layers=2, num_heads=1, mlp_dim=8)
    return model_config.resolve(dict(image_aspect_ratio=mode, vision_tower=dict(type=tower, **sizes)))


def image_of(mode, shape, seed=0):
    """Noise on a gradient, with every alpha value: edges and slopes expose resampling errors."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    values = (rows * 3 + columns * 2)[..., None] % 256 * 0.6 + rng.integers(0, 100, (*shape, 4))
    image = Image.fromarray(values.astype(np.uint8), "CMYK" if mode == "CMYK" else "RGBA")
    return image if mode in ("CMYK", "RGBA") else image.convert(mode)


def theirs(image, mode, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """VILA's pipeline: PIL to RGB, 'resize' or 'pad' in PIL, the processor; scaled back to 0..255."""
    image = image.convert("RGB")
    if mode == "resize":
        image = image.resize((SIZE, SIZE))
    elif mode == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    processor = SiglipImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=list(mean), image_std=list(std)
    )
    (values,) = processor(image, return_tensors="np")["pixel_values"]
    return ((values.transpose(1, 2, 0) * std) + mean) * 255


def encoded(image, form):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def ours(data, mode, tower="siglip"):
    (pixels,) = image_processor(model(mode, tower)).inputs(decode_image(data, alpha="ignore"))  # as VILA does
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    return pixels.astype(float)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize("mode", ["resize", "pad"])
def test_pixels(mode, colours, shape):
    image = image_of(colours, shape)
    data = encoded(image, COLOURS[colours])
    np.testing.assert_allclose(ours(data, mode), theirs(image, mode), atol=1)


@pytest.mark.parametrize("colours", ["L", "RGB"])
def test_the_processor_alone_resizes_alike(colours):
    """'resize' equals the processor's own resizing, so VILA's and transformers' pipelines agree."""
    image = image_of(colours, (37, 211))
    np.testing.assert_allclose(ours(encoded(image, "PNG"), "resize"), theirs(image, "none"), atol=1)


def test_pad_has_the_background_of_the_towers_mean():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = image_of("RGB", (37, 211))
    got = ours(encoded(image, "PNG"), "pad", "intern_vit")
    np.testing.assert_allclose(got, theirs(image, "pad", mean, std), atol=1)
    assert got[0, 0].tolist() == [123, 116, 103]


@pytest.mark.parametrize("mode", ["resize", "pad"])
def test_sixteen_bits_of_the_range_of_eight_are_alike(mode):
    """In this range PIL's clipping at 255 and our percentile window differ only by the percentiles."""
    values = np.random.default_rng(0).integers(0, 256, (61, 83)).astype(np.uint16)
    values[0, :2] = 0, 255
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    np.testing.assert_allclose(ours(encoded(image, "PNG"), mode), theirs(image, mode), atol=3)


def test_sixteen_bits_of_a_wider_range_are_stretched_where_pil_cuts():
    """A 12-bit film: PIL's `convert("RGB")` turns nearly all of it white; ours keeps the contrast."""
    values = np.random.default_rng(0).integers(0, 4096, (61, 83)).astype(np.uint16)
    values[0, :2] = 0, 4095
    image = Image.fromarray(values)
    low, high = np.percentile(values, (0.5, 99.5))
    stretched = Image.fromarray((np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8))
    got = ours(encoded(image, "PNG"), "resize")
    np.testing.assert_allclose(got, theirs(stretched, "resize"), atol=1)
    assert (theirs(image, "resize") > 250).mean() > 0.8 > 0.1 > (got > 250).mean()
