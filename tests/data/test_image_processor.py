"""Image processing by config; invalid settings are refused with the numbers in question."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vilam3_jax.data.examples import Turn
from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.data.images import resize
from vilam3_jax.data.templates import Encoded
from vilam3_jax.errors import UserError
from vilam3_jax.models import model_config

RNG = np.random.default_rng(0)


def model(**keys):
    sizes = dict(image_size=16, patch_size=8, hidden_size=8, num_layers=1, num_heads=1, mlp_dim=8)
    return model_config.resolve({"vision_tower": {"type": "siglip", **sizes}, **keys})


def processor(**keys):
    return image_processor(model(**keys))


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_models_without_the_key_resize():
    """Exports from before the key existed."""
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
    assert image_processor(model(s2_scales=(16, 32)), pairs=True).size == 16


def dynamic(most=12):
    return processor(image_aspect_ratio="dynamic", max_tiles=most)


@pytest.mark.parametrize(
    "height, width, most, grid",
    [
        (60, 80, 12, (3, 4)),  # the very shape, in 12 tiles
        (40, 60, 12, (2, 3)),
        (10, 30, 12, (1, 3)),  # 2 x 6 has its shape, too, but the picture has less than half the pixels
        (23, 69, 12, (2, 6)),
        (16, 16, 12, (1, 1)),
        (23, 23, 12, (2, 2)),  # 529 pixels, more than half of 4 tiles
        (40, 40, 12, (3, 3)),
        (40, 40, 4, (2, 2)),
        (900, 10, 12, (12, 1)),  # a shape beyond all grids
        (60, 80, 1, (1, 1)),
    ],
)
def test_the_grid_is_the_nearest_in_shape(height, width, most, grid):
    assert dynamic(most).grid(np.zeros((height, width, 3), np.uint8)) == grid


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 16))
def test_no_grid_is_nearer(height, width, most):
    rows, columns = dynamic(most).grid(np.zeros((height, width, 3), np.uint8))
    shape = Fraction(width, height)
    every = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]
    nearest = min(abs(shape - Fraction(c, r)) for r, c in every)
    assert abs(shape - Fraction(columns, rows)) == nearest
    area = {r * c for r, c in every if Fraction(c, r) == Fraction(columns, rows)}
    fits = [n for n in area if 2 * width * height > 256 * n]
    assert rows * columns == max([min(area), *fits])


def test_tiles_run_row_by_row_and_the_whole_comes_last():
    wide = picture(30, 50)
    *tiles, whole = dynamic(6).inputs(wide)
    scaled = np.asarray(Image.fromarray(wide).resize((48, 32)))
    assert len(tiles) == 6
    np.testing.assert_array_equal(
        np.concatenate([np.concatenate(row, axis=1) for row in (tiles[:3], tiles[3:])]), scaled
    )
    np.testing.assert_array_equal(whole, resize(wide, 16))
    assert dynamic(6).max_inputs == 7 and dynamic(1).max_inputs == 1


def test_one_tile_is_the_plain_image():
    for shape, most in (((9, 30), 1), ((16, 15), 12)):
        image = picture(*shape)
        (tile,) = dynamic(most).inputs(image)
        np.testing.assert_array_equal(tile, processor().inputs(image)[0])
        turns = [Turn("user", "<image> and text")]
        assert dynamic(most).expand(turns, [dynamic(most).grid(image)]) == turns


def test_every_tile_gets_a_line():
    turns = [Turn("user", "<image>\nWhich? The results are <image>. Now <image>\n\nend")]
    (turn,) = dynamic().expand(turns, [(1, 1), (1, 2), (2, 1)])
    three = "<image>\n" * 3
    assert turn.text == f"<image>\nWhich? The results are {three}. Now {three}\nend"
    for grids, message in (([(1, 1)], "more markers than the 1"), ([(1, 1)] * 4, "fewer markers than the 4")):
        with pytest.raises(ValueError, match=message):
            dynamic().expand(turns, grids)


def dynamic_s2(most=12):
    return processor(image_aspect_ratio="dynamic_s2", max_tiles=most, s2_scales=(16, 32, 48))


def test_dynamic_s2_cuts_every_scale():
    tall = picture(70, 50)
    assert dynamic_s2().size == 16 and dynamic_s2().grid(tall) == (4, 3)
    inputs = dynamic_s2().inputs(tall)
    assert len(inputs) == 1 + 4 + 12 == dynamic_s2().max_inputs and dynamic_s2().max_markers == 12
    np.testing.assert_array_equal(inputs[0], resize(tall, 16))
    scaled = resize(tall, 32)
    np.testing.assert_array_equal(inputs[2], scaled[:16, 16:])
    last = np.asarray(Image.fromarray(tall).resize((48, 64)))
    np.testing.assert_array_equal(inputs[5 + 3 * 2 + 1], last[32:48, 16:32])
    for shape, grid in (((50, 50), (3, 3)), ((9, 99), (1, 11)), ((90, 9), (10, 1))):
        assert dynamic_s2().grid(picture(*shape)) == grid  # 9 to 12 tiles, whatever the size


def test_dynamic_s2_maps_tiles_and_merges_rows():
    grids = [(1, 1), (3, 4)]
    table = dynamic_s2().tile_map(grids)
    assert table.shape == (1 + 17, 5) and table[0].tolist() == [0, 1, 0, 1, 0]
    assert (table[1:, 0] == 1).all() and (table[1:6, 1:] == (1, 0, 1, 0)).all()
    assert table[6 + 4 * 2 + 3].tolist() == [1, 3, 2, 4, 3]
    turns = [Turn("user", "a<image>\nb <image> c")]
    (turn,) = dynamic_s2().expand(turns, grids)
    assert turn.text == "a<image>\nb " + "<image>" * 12 + " c"
    which = np.repeat(np.arange(13), 4)
    encoded = Encoded(
        np.zeros(54, np.int32), np.zeros(54, np.float32), np.concatenate([[-1], which, [-1]]),
        np.concatenate([[0], np.tile(np.arange(4), 13), [0]]), 13,
    )  # fmt: skip
    merged = dynamic_s2().merge(encoded, grids, 4)
    assert merged.num_images == 18 and merged.image_of_token[[0, -1]].tolist() == [-1, -1]
    assert merged.image_of_token[1:5].tolist() == [0] * 4
    # The first row of pixels of 4 tiles of 2 x 2 tokens, then the second.
    assert merged.image_of_token[5:21].tolist() == [6, 6, 7, 7, 8, 8, 9, 9] * 2
    assert merged.visual_offset[5:21].tolist() == [0, 1] * 4 + [2, 3] * 4
    assert merged.image_of_token[-2] == 17 and merged.visual_offset[-2] == 3
    # Text that text rules add after every marker (`image_end`) stays only after a whole image.
    which = np.repeat(np.arange(13), 5)
    ends = np.tile(np.arange(5), 13) == 4
    ended = Encoded(
        np.where(ends, 7, 0).astype(np.int32), np.zeros(65, np.float32), np.where(ends, -1, which),
        np.where(ends, 0, np.tile(np.arange(5), 13)), 13,
    )  # fmt: skip
    joined = dynamic_s2().merge(ended, grids, 4)
    assert np.flatnonzero(joined.tokens).tolist() == [4, 5 + 48]
    assert np.delete(joined.image_of_token, [4, 53]).tolist() == merged.image_of_token[1:-1].tolist()
    assert np.delete(joined.visual_offset, [4, 53]).tolist() == merged.visual_offset[1:-1].tolist()


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(image_aspect_ratio="crop"), "'crop': use one of resize, pad, dynamic, dynamic_s2"),
        (dict(s2_scales=(16,)), r"s2_scales=\(16,\).*tower's 16 pixels"),
        (dict(s2_scales=(16, 40)), r"s2_scales=\(16, 40\).*tower's 16 pixels"),
        (dict(s2_scales=(32, 16)), r"s2_scales=\(32, 16\).*tower's 16 pixels"),
        (dict(s2_scales=(16, 32.0)), r"s2_scales=\(16, 32.0\).*tower's 16 pixels"),
        (dict(s2_scales=(16, 16_000)), "1000 times the tower's 16 pixels, 1000000 tiles"),
        (dict(image_aspect_ratio="dynamic", max_tiles=0), "max_tiles=0: must be 1 to 64"),
        (dict(image_aspect_ratio="dynamic", max_tiles=65), "max_tiles=65: must be 1 to 64"),
        (dict(image_aspect_ratio="dynamic", max_tiles=2.5), "max_tiles=2.5: must be of type int"),
        (dict(image_aspect_ratio="dynamic_s2"), r"s2_scales is empty.*\(16, 32, 48\)"),
        (
            dict(image_aspect_ratio="dynamic_s2", s2_scales=(16, 32, 48), max_tiles=8),
            r"max_tiles=8.*\(16, 32, 48\) alone has 9 tiles",
        ),
        (dict(image_aspect_ratio="dynamic", s2_scales=(16, 32)), r"\(16, 32\).*'dynamic' has no scales"),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        processor(**keys)
