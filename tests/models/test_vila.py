"""The whole model: images at their positions, empty slots without effect, abstract building."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.tiny_model import make, model_config
from vilam3_jax import tasks  # noqa: F401, registers batches as pytrees
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.errors import UserError
from vilam3_jax.models import build, siglip
from vilam3_jax.models import model_config as model_config_lib
from vilam3_jax.ops import attention
from vilam3_jax.ops.attention import backends
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding import mesh as mesh_lib

TOKENS = 9  # per image of the tiny model
GROUPS, SLOTS, ROWS, LENGTH = 2, 3, 4, 24


@pytest.fixture(scope="module")
def model():
    graphdef, params = make(model_config())
    return graphdef, params


def batch(seed=0):
    """Two groups of two rows. Row 0 shows (group 0, slot 1), row 1 (0, 0), row 2 no image, row 3 (1, 2)."""
    rng = np.random.default_rng(seed)
    visual = np.full((ROWS, LENGTH), -1)
    visual[0, 2:11] = 1 * TOKENS + np.arange(TOKENS)
    visual[1, 10:19] = 0 * TOKENS + np.arange(TOKENS)
    visual[3, 0:9] = 2 * TOKENS + np.arange(TOKENS)
    segments = np.ones((ROWS, LENGTH), int)
    segments[2, 12:] = 2
    segments[:, -2:] = 0
    return PackedBatch(
        tokens=jnp.asarray(rng.integers(0, 41, (ROWS, LENGTH))),
        segment_ids=jnp.asarray(segments),
        positions=jnp.arange(LENGTH)[None].repeat(ROWS, 0),
        loss_weights=jnp.zeros((ROWS, LENGTH)),
        images=jnp.asarray(rng.integers(0, 256, (GROUPS, SLOTS, 20, 20, 3), dtype=np.uint8)),
        image_valid=jnp.asarray([[True, True, False], [False, True, True]]),
        visual_index=jnp.asarray(visual),
    )


@pytest.fixture(scope="module")
def step(model):
    """(params, images) -> (a loss over real positions, its gradient); compiled once for the module."""
    graphdef, _ = model
    data = batch()

    @jax.jit
    @jax.value_and_grad
    def run(params, images):
        hidden = build.merge(graphdef, params)(dataclasses.replace(data, images=images))
        return jnp.square(hidden * (data.segment_ids != 0)[..., None]).sum()

    return run


def embed(model, data):
    graphdef, params = model
    return np.asarray(_embed(graphdef, params, *image_arguments(data)))


def image_arguments(data):
    return data.tokens, data.images, data.image_valid, data.visual_index


@partial(jax.jit, static_argnums=0)
def _embed(graphdef, params, *args):
    return build.merge(graphdef, params).embed(*args)


def test_every_image_stands_in_its_place(model):
    graphdef, params = model
    data = batch()
    built = build.merge(graphdef, params)
    assert model_config_lib.resolve(model_config()).tokens_per_image == TOKENS
    got = embed(model, data)
    text = np.array(built.llm.embed(data.tokens))
    encode = jax.jit(built.encode_images)
    assert encode(data.images[0]).shape[1] == TOKENS
    for row, group, slot, start in ((0, 0, 1, 2), (1, 0, 0, 10), (3, 1, 2, 0)):
        alone = encode(data.images[group, slot][None])[0]
        np.testing.assert_allclose(got[row, start : start + TOKENS], alone, atol=1e-5)
        text[row, start : start + TOKENS] = got[row, start : start + TOKENS]
    np.testing.assert_array_equal(got, text)


def test_empty_slots_change_nothing(model, step):
    _, params = model
    images = batch().images
    one, two = step(params, images), step(params, images.at[0, 2].set(255).at[1, 0].set(7))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert step(params, images.at[0, 1].set(255))[0] != one[0]


def test_an_index_into_an_empty_slot_reads_zeros(model):
    data = batch()
    data = dataclasses.replace(data, visual_index=data.visual_index.at[2, 5].set(3))  # group 1, slot 0: empty
    np.testing.assert_array_equal(embed(model, data)[2, 5], 0)


def test_an_index_beyond_the_group_shows_itself(model):
    data = batch()
    data = dataclasses.replace(data, visual_index=data.visual_index.at[2, 5].set(SLOTS * TOKENS))
    assert np.isnan(embed(model, data)[2, 5]).all()


def test_unused_tower_parts_get_no_gradient(model, step):
    gradient = step(model[1], batch().images)[1]
    tower = gradient["vision_tower"]
    kernel = np.asarray(tower["blocks"]["attn"]["q"]["kernel"])
    assert not kernel[-1].any() and all(kernel[i].any() for i in range(len(kernel) - 1))
    assert not any(np.any(x) for x in jax.tree.leaves([tower["head"], tower["post_norm"]]))
    assert all(
        np.any(x) for x in jax.tree.leaves([gradient["projector"], gradient["llm"], tower["patch_embed"]])
    )


def test_text_alone_needs_no_images(model):
    graphdef, params = model
    data = batch()
    built = build.merge(graphdef, params)
    run = jax.jit(built.__call__)
    text_only = run(dataclasses.replace(data, images=None, image_valid=None, visual_index=None))
    nothing = run(dataclasses.replace(data, visual_index=jnp.full((ROWS, LENGTH), -1)))
    np.testing.assert_allclose(text_only, nothing, atol=1e-6)


def test_bad_batches_are_refused(model):
    graphdef, params = model
    built = build.merge(graphdef, params)
    data = batch()
    with pytest.raises(ValueError, match="image_valid"):
        built.embed(data.tokens, data.images)
    with pytest.raises(ValueError, match="4 rows do not divide into 3 groups"):
        images = jnp.zeros((3, 1, 20, 20, 3), jnp.uint8)
        built.embed(data.tokens, images, jnp.ones((3, 1), bool), data.visual_index)
    with pytest.raises(ValueError, match="image_tiles"):
        built.embed(*image_arguments(data), jnp.zeros((GROUPS, SLOTS, 5), int))
    with pytest.raises(ValueError, match="uint8"):
        built.encode_images(jnp.zeros((1, 20, 20, 3)))


@pytest.mark.parametrize("task", ["generative", "contrastive"])
def test_building_is_abstract_deterministic_and_jittable(task):
    cfg = model_config(lora_rank=2, tie_embeddings=False)
    _, abstract = build.abstract_model(cfg, task)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    # Optimising the code of random numbers would take most of this test's time.
    options = {"xla_backend_optimization_level": 0}
    init = jax.jit(partial(build.init_params, cfg, task)).lower(jax.random.key(0)).compile(options)
    one, two, other = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    same_shape = jax.tree.map(lambda x, a: x.shape == a.shape and x.dtype == a.dtype, one, abstract)
    assert all(jax.tree.leaves(same_shape))
    kernel = "llm" if task == "generative" else "text_tower"
    first, second = (jax.tree.leaves(x[kernel]["embed"])[0] for x in (one, other))
    assert np.abs(first - second).max() > 0
    if task == "contrastive":  # initial values of the paper
        assert float(one["logit_scale"]) == pytest.approx(np.log(10)) and float(one["logit_bias"]) == -10


def test_bfloat16_compute_stays_near_float32():
    cfg = model_config()
    graphdef, params = make(cfg)
    want = jax.jit(build.merge(graphdef, params).__call__)(batch())
    cfg.dtype = "bfloat16"
    low = build.merge(build.abstract_model(cfg, "generative")[0], params)
    got = jax.jit(low.__call__)(batch())
    assert got.dtype == jnp.bfloat16
    real = np.asarray(batch().segment_ids != 0)
    error = np.abs(got.astype(jnp.float32) - want)[real]
    assert np.mean(error) < 0.03 * np.abs(want).std()


def test_unknown_families_are_refused():
    cfg = model_config()
    with pytest.raises(UserError, match="generative"):
        build.abstract_model(cfg, "both")
    cfg.llm.type = "mamba"
    with pytest.raises(UserError, match="llama"):
        build.abstract_model(cfg, "generative")
    cfg = model_config()
    cfg.image_size = 24
    with pytest.raises(UserError, match=r"image_size=24.*20"):
        build.abstract_model(cfg, "generative")
    cfg = model_config()
    cfg.update(dict(image_aspect_ratio="dynamic_s2", s2_scales=(20, 40)))
    with pytest.raises(UserError, match=r"'dynamic_s2'.*token_order='column'"):
        build.abstract_model(cfg, "generative")
    cfg = model_config()
    cfg.vision_tower.select_layer = -5
    with pytest.raises(UserError, match="select_layer=-5"):
        build.abstract_model(cfg, "generative")


def test_a_tower_whose_rows_are_padded_sees_the_same(model, monkeypatch):
    """Padding for TPU kernels has no effect, forward and backward."""
    graphdef, params = model
    images = batch().images[0]

    def features_of(params):
        return build.merge(graphdef, params).vision_tower.features(images) ** 3

    def both():
        return jax.jit(features_of)(params), jax.jit(jax.grad(lambda p: features_of(p).sum()))(params)

    plain = both()
    lengths = []
    monkeypatch.setattr(siglip, "row_length", lambda tokens: lengths.append(tokens) or tokens + 7)
    padded = both()
    assert lengths and set(lengths) == {25}
    for one, other in zip(plain, padded, strict=True):
        # The tolerance follows the largest leaf: gradients of the keys' biases are rounding errors of zero.
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6 * largest), one, other)


def test_rows_are_padded_for_kernels_where_it_costs_little():
    mesh = mesh_lib.build_mesh(mesh_lib.MeshConfig())
    assert [attention.row_length(tokens) for tokens in (729, 1025)] == [729, 1025]
    with logical_axes.activation_rules(mesh, logical_axes.ACTIVATION_RULES), backends.use("splash"):
        lengths = [attention.row_length(tokens) for tokens in (100, 729, 768, 1024, 1025)]
    assert lengths == [100, 768, 768, 1024, 1025]
