"""Projectors: which patches a token joins, the order of tokens, and the layers after it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models.projector import Projector, ProjectorConfig, join_neighbours


def make(kind, order="column", in_dim=3, out_dim=5):
    cfg = ProjectorConfig(type=kind, token_order=order)
    return Projector(cfg, in_dim, out_dim, rngs=nnx.Rngs(0), dtype="float32", param_dtype="float32")


def test_neighbours_by_hand():
    """A 3x3 grid of patches 1..9, padded to 4x4 with zeros at the bottom and the right."""
    x = jnp.arange(1, 10).reshape(1, 9, 1)
    top_left, top_right, bottom_left, bottom_right = [1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]
    np.testing.assert_array_equal(
        join_neighbours(x, 2, column_order=False)[0], [top_left, top_right, bottom_left, bottom_right]
    )
    np.testing.assert_array_equal(
        join_neighbours(x, 2, column_order=True)[0], [top_left, bottom_left, top_right, bottom_right]
    )


def test_column_order_walks_down_the_columns():
    """Token t covers row t % 14 and column t // 14 of the new grid (27 x 27 SigLIP patches)."""
    patches = np.stack(np.meshgrid(np.arange(27), np.arange(27), indexing="ij"), axis=-1).reshape(1, 729, 2)
    tokens = np.asarray(join_neighbours(jnp.asarray(patches), 2, column_order=True))[0]
    t = np.arange(196)
    np.testing.assert_array_equal(tokens[:, :2], np.stack([2 * (t % 14), 2 * (t // 14)], axis=1))


@pytest.mark.parametrize(
    "kind, tokens",
    [
        ("mlp_downsample", 196),
        ("mlp_downsample_2x2_fix", 196),
        ("mlp_downsample_3x3_fix", 81),
        ("mlp_downsample_3x3_s2", 81),
        ("mlp_downsample_3x3_s2_new", 81),
        ("mlp2x_gelu", 729),
        ("linear", 729),
    ],
)
def test_token_count_is_what_comes_out(kind, tokens):
    projector = make(kind)
    assert projector.layers.num_tokens(27) == tokens
    assert jax.eval_shape(projector.__call__, jnp.ones((2, 729, 3))).shape == (2, tokens, 5)


def test_layers_by_formula():
    projector = make("mlp_downsample", "row")
    projector.norm1.scale[...] = jnp.linspace(0.5, 2, 12)
    projector.norm1.bias[...] = jnp.linspace(-1, 1, 12)
    projector.fc1.bias[...] = jnp.linspace(-1, 1, 5)
    x = np.random.default_rng(0).normal(size=(1, 4, 3))
    joined = x.reshape(1, 1, 12)
    normal = (joined - joined.mean(-1, keepdims=True)) / np.sqrt(joined.var(-1, keepdims=True) + 1e-5)
    normal = normal * np.linspace(0.5, 2, 12) + np.linspace(-1, 1, 12)
    hidden = normal @ np.asarray(projector.fc1.kernel[...]) + np.linspace(-1, 1, 5)
    erf = np.vectorize(math.erf)
    want = (0.5 * hidden * (1 + erf(hidden / 2**0.5))) @ np.asarray(projector.fc2.kernel[...])
    np.testing.assert_allclose(projector(jnp.asarray(x, jnp.float32)), want, atol=1e-5)


def test_identity_returns_its_input():
    x = jnp.arange(12.0).reshape(1, 4, 3)
    np.testing.assert_array_equal(make("identity", out_dim=3)(x), x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mlp0x_gelu",), "mlp_downsample"),
        (("mlp_downsample", "diagonal"), "token_order"),
        (("identity",), "the tower has 3 and the LLM 5"),
        (("mlp_downsample_3x3_s2", "row", 4), "4 channels do not divide by 3"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make(*arguments)


def test_patches_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="6 patches do not form a square grid"):
        make("mlp_downsample")(jnp.ones((1, 6, 3)))
