"""The loader with padded images, several scales, and tiles."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from data_worlds import (
    TOKENS_PER_IMAGE,
    annotate,
    build,
    config,
    ct_annotation,
    ct_example,
    ct_volume,
    film,
    pair,
    same,
    take,
    tokenizer,
    write,
)

from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.experts.overlays import expert_overlay
from vilam3_jax.data.images import encode_png, pad_to_square, resize
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    write(folder / "films", [film(i, rng) for i in range(37)])
    write(folder / "pairs", [pair(i) for i in range(20)])
    return folder


def test_padded_images_and_overlays_keep_their_shape(tmp_path) -> None:
    """Overlays are drawn before padding, so that colours stay on their organs."""
    key = ct_volume(tmp_path / "slices")
    example, annotation = ct_example(key), ct_annotation(key)
    write(tmp_path / "slices", [example])
    annotate(tmp_path / "said", [annotation])
    cfg = config(tmp_path, (("slices", 1.0),), experts="on", annotations=str(tmp_path / "said"), seq_len=2048)
    cfg.model.image_aspect_ratio = "pad"
    loader = build(cfg)
    (batch,) = take(loader, 1)
    loader.close()
    volume = load_volume(tmp_path / "slices" / "ct.nii.gz")
    plane = DEFAULT_PREPROCESSING.slice_image(volume, 2, 5, (50.0, 400.0))
    assert plane.shape == (12, 10, 3)
    for got, shown in zip(
        batch.images[0], (plane, expert_overlay(annotation, plane, axis=2, index=5)), strict=False
    ):
        np.testing.assert_array_equal(got, resize(pad_to_square(shown, (127, 127, 127)), 8))


def test_several_scales_are_one_input_of_the_largest(root) -> None:
    cfg = config(root)
    cfg.model.s2_scales = (8, 16)
    loader = build(cfg)
    (batch,) = take(loader, 1)
    loader.close()
    assert batch.images.shape == (4, 4, 16, 16, 3) and batch.image_valid.any()


def strip(number: int, width: int = 36) -> Example:
    """A film of 12 rows; 36 columns give 3 tiles and a thumbnail."""
    image = np.random.default_rng(number).integers(0, 256, (12, width, 3)).astype(np.uint8)
    turns = (Turn("user", "<image>\nWhat is shown?"), Turn("assistant", f"film {number}", True))
    meta = {"patient": f"p{number}", "modality": "PNEUMONIA"}
    return Example(f"strip{number}", "conversation", (ImageRef(data=encode_png(image)),), turns, (), meta)


def tiled(cfg, most=3):
    cfg.model.image_aspect_ratio, cfg.model.max_tiles = "dynamic", most
    return cfg


def test_one_tile_gives_the_very_batches_of_no_tiles(root) -> None:
    batches = []
    for cfg in (config(root), tiled(config(root), 1)):
        loader = build(cfg)
        batches.append(take(loader, 3))
        loader.close()
    assert same(*batches)


def test_tiles_take_slots_and_positions(tmp_path) -> None:
    write(tmp_path / "films", [strip(i, width) for i, width in enumerate((36, 12, 24, 36, 13))])
    loader = build(tiled(config(tmp_path, images_per_group=8, global_rows=4, seq_len=120)))
    tiles_of = {0: 4, 1: 1, 2: 3, 3: 4, 4: 1}
    for batch in take(loader, 4):
        for group in range(2):
            used = batch.visual_index[2 * group : 2 * group + 2]
            shown = np.unique(used[used >= 0])
            valid = np.flatnonzero(batch.image_valid[group])
            every = valid[:, None] * TOKENS_PER_IMAGE + np.arange(TOKENS_PER_IMAGE)
            np.testing.assert_array_equal(shown, every.reshape(-1))
            assert len(valid) <= 8 and len(valid) in {
                sum(c)
                for n in range(9)
                for c in itertools.combinations_with_replacement(tiles_of.values(), n)
            }
        # Tiles of an image are separated by a newline.
        row = batch.visual_index[0]
        ends = np.flatnonzero((row >= 0) & (np.append(row[1:], -1) == -1))
        assert (batch.tokens[0, ends + 1] == tokenizer().encode_continued("\n")[0]).all()
    loader.close()


def test_swapped_images_are_cut_as_the_text_has_room_for(tmp_path) -> None:
    write(tmp_path / "films", [strip(i, (36, 12)[i % 2]) for i in range(6)], "heldout")
    cfg = tiled(config(tmp_path, images_per_group=8))
    plain, swapped = build(cfg, "heldout"), build(cfg, "heldout", swap_images=True)
    one, other = list(plain), list(swapped)
    plain.close()
    swapped.close()
    for a, b in zip(one, other, strict=True):
        assert same([dataclasses.replace(a, images=b.images)], [b])
        assert not np.array_equal(a.images, b.images)


def test_too_many_tiles_for_a_group_are_refused(root) -> None:
    with pytest.raises(UserError, match=r"images_per_group=4.*13 inputs"):
        build(tiled(config(root), 12))
    with pytest.raises(UserError, match=r"seq_len=96.*40 x 4 = 160 tokens"):
        build(tiled(config(root, images_per_group=40), 39))


def test_pairs_are_never_cut(root) -> None:
    cfg = tiled(config(root, (("pairs", 1.0),), global_pairs=8), 12)
    cfg.task = "contrastive"
    loader = build(cfg)
    (batch,) = take(loader, 1)
    loader.close()
    assert batch.images.shape == (8, 8, 8, 3)


def test_merged_tiles_know_their_image(tmp_path) -> None:
    write(tmp_path / "films", [strip(i, (36, 12)[i % 2]) for i in range(6)])
    cfg = tiled(config(tmp_path, images_per_group=12, global_rows=4, seq_len=96), 4)
    cfg.model.image_aspect_ratio, cfg.model.s2_scales = "dynamic_s2", (8, 16)
    loader = build(cfg)
    for batch in take(loader, 3):
        assert batch.image_tiles.shape == (2, 12, 5) and batch.image_tiles.dtype == np.int32
        for tiles, valid, visual in zip(
            batch.image_tiles, batch.image_valid, batch.visual_index.reshape(2, -1), strict=True
        ):
            own = np.unique(visual[visual >= 0] // TOKENS_PER_IMAGE)
            firsts = np.unique(tiles[valid, 0])
            assert len(firsts) * 5 == valid.sum() > 0  # the lower scale, and 4 tiles
            for first in firsts:
                assert (tiles[first : first + 5, 0] == first).all() and first not in own
                grid = tiles[first + 1 : first + 5]
                assert set(range(first + 1, first + 5)) <= set(own)
                assert (grid[:, 2] * grid[:, 3] + grid[:, 4]).tolist() == [0, 1, 2, 3]
            assert (tiles[~valid, 1:] == (1, 0, 1, 0)).all()
    loader.close()
    with pytest.raises(UserError, match=r"images_per_group=4.*5 inputs"):
        cfg.data.images_per_group = 4
        build(cfg)
