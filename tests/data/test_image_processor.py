"""Pictures become the model's inputs as the config says; what cannot be is refused with both numbers."""

from __future__ import annotations

import numpy as np
import pytest
from ml_collections import ConfigDict

from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.data.images import resize
from vilam3_jax.errors import UserError

RNG = np.random.default_rng(0)


def processor(**keys):
    return image_processor(ConfigDict(dict(image_size=16, vision_tower=dict(type="siglip"), **keys)))


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_models_without_the_key_resize():
    """Exports of before the key existed."""
    wide = picture(9, 30)
    assert processor().kept_size == 16
    np.testing.assert_array_equal(processor().inputs(wide)[0], resize(wide, 16))


@pytest.mark.parametrize("shape", [(5, 16), (16, 5)])
def test_pad_keeps_the_shape_and_centres(shape):
    odd = picture(*shape)
    (square,) = processor(image_aspect_ratio="pad").inputs(odd)
    want = np.full((16, 16, 3), 127, np.uint8)
    want[(slice(5, 10), slice(None)) if shape[0] == 5 else (slice(None), slice(5, 10))] = odd
    np.testing.assert_array_equal(square, want)
    assert processor(image_aspect_ratio="pad").kept_size is None


def test_several_scales_take_the_largest():
    assert processor(s2_scales=(16, 32)).size == 32
    model = ConfigDict(dict(image_size=16, vision_tower=dict(type="siglip"), s2_scales=(16, 32)))
    assert image_processor(model, pairs=True).size == 16


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(image_aspect_ratio="crop"), "'crop': use one of resize, pad"),
        (dict(s2_scales=(16,)), r"s2_scales=\(16,\).*tower's 16 pixels"),
        (dict(s2_scales=(16, 40)), r"s2_scales=\(16, 40\).*tower's 16 pixels"),
        (dict(s2_scales=(32, 16)), r"s2_scales=\(32, 16\).*tower's 16 pixels"),
        (dict(s2_scales=(16, 32.0)), r"s2_scales=\(16, 32.0\).*tower's 16 pixels"),
        (dict(s2_scales=(16, 16_000)), "1000 times the tower's 16 pixels, 1000000 tiles"),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        processor(**keys)
