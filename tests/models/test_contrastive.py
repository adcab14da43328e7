"""The two towers: unit embeddings, and padding without effect."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.tiny_model import make, model_config
from vilam3_jax.models import build, siglip


@pytest.fixture(scope="module")
def towers():
    graphdef, params = make(model_config(), "contrastive")
    return partial(jax.jit(lambda params, *batch: build.merge(graphdef, params)(*batch)), params)


def pairs():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (3, 20, 20, 3), dtype=np.uint8))
    tokens = jnp.asarray(rng.integers(0, 41, (3, 8)))
    return images, tokens, jnp.asarray(np.arange(8) < np.array([[8], [5], [0]]))


def test_embeddings_have_unit_length(towers):
    img, txt = towers(*pairs())
    assert img.dtype == txt.dtype == jnp.float32 and img.shape == txt.shape == (3, 16)
    np.testing.assert_allclose(jnp.linalg.norm(img, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(txt, axis=1), 1, atol=1e-5)  # the empty text too


def test_padding_tokens_change_nothing(towers):
    images, tokens, valid = pairs()
    _, one = towers(images, tokens, valid)
    _, two = towers(images, jnp.where(valid, tokens, 7), valid)
    np.testing.assert_array_equal(one[:2], two[:2])
    _, three = towers(images, tokens.at[1, 4].set(0), valid)  # the last valid token of row 1
    assert np.abs(one[1] - three[1]).max() > 1e-3


def test_text_longer_than_the_table_is_refused(towers):
    with pytest.raises(ValueError, match="9 tokens"):
        towers(pairs()[0], jnp.zeros((3, 9), int), jnp.ones((3, 9), bool))


@pytest.mark.parametrize(("patch", "width"), [(14, 1152), (16, 192), (8, 48), (2, 16)])
def test_first_filters_see_structure_more_than_a_flat_grey(patch, width):
    embed = siglip.PatchEmbed(patch, width, rngs=nnx.Rngs(params=0), dtype="float32", param_dtype="float32")
    kernel = np.asarray(embed.kernel[...])
    assert kernel.shape == (patch, patch, 3, width)
    assert np.linalg.matrix_rank(kernel.reshape(-1, width)) == min(width, 3 * patch**2)
    ramp = np.broadcast_to(np.linspace(-1, 1, patch)[:, None, None], (1, patch, patch, 3))
    flat, sloped = (np.asarray(embed(x.astype(np.float32))) for x in (np.full_like(ramp, -1.0), ramp))
    assert np.abs(flat).mean() < 1.5 and np.abs(sloped).mean() > np.abs(flat).mean()
