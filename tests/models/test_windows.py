"""Decoders with sliding windows: packing, the KV cache, and how far a token sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.tiny_model import make, model_config
from vilam3_jax.models import build, families
from vilam3_jax.models import model_config as model_config_lib

LENGTH, WINDOW = 20, 4
FAMILIES = {
    # Layers 0 and 2 of three have the window, layer 1 sees everything.
    "gemma3": dict(
        sliding_window=WINDOW,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        query_scale=6,
    ),
    "mistral": dict(sliding_window=WINDOW),
}


def config_of(family, **changes):
    cfg = model_config()
    cfg.llm = {**cfg.llm.to_dict(), "type": family, **FAMILIES[family], **changes}
    return cfg


def states(graphdef, params, tokens, segments=None, positions=None):
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions

    @jax.jit
    def run(params):
        llm = build.merge(graphdef, params).llm
        return llm(llm.embed(tokens), segments, positions)

    return np.asarray(run(params))


def random_tokens(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 41, (rows, LENGTH)))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_of_the_layers(family):
    llm = model_config_lib.resolve(config_of(family)).llm
    want = (WINDOW, None, WINDOW) if family == "gemma3" else (WINDOW,) * 3
    assert tuple(families.get("llm", family).attention_windows(llm)) == want
    graphdef, params = make(config_of(family))
    assert tuple(kind.window for kind in build.merge(graphdef, params).llm.kinds) == want


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_sees_as_far_as_its_windows_reach(family):
    """Three layers of window 4 reach 3 * 3 tokens back; a full layer reaches the first."""
    graphdef, params = make(config_of(family))
    tokens = random_tokens(1)
    before, after = (states(graphdef, params, x) for x in (tokens, tokens.at[0, 5].set(3)))
    assert tokens[0, 5] != 3
    moved = np.abs(before - after)[0].max(axis=-1) > 0
    reach = LENGTH if family == "gemma3" else 5 + 3 * (WINDOW - 1) + 1
    np.testing.assert_array_equal(moved, (np.arange(LENGTH) >= 5) & (np.arange(LENGTH) < reach))


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_the_full_forward(family):
    graphdef, params = make(config_of(family))
    tokens = random_tokens(2)
    want = states(graphdef, params, tokens)

    @jax.jit
    def extend(params, chunk, at, cache):
        llm = build.merge(graphdef, params).llm
        positions = at[:, None] + jnp.arange(chunk.shape[1])
        return llm.forward_cached(llm.embed(chunk), positions, cache, at)

    cache = build.merge(graphdef, params).llm.init_cache(2, LENGTH)
    at = 0
    for width in (9, 9, 1, 1):
        hidden, cache = extend(params, tokens[:, at : at + width], jnp.full(2, at), cache)
        np.testing.assert_allclose(hidden, want[:, at : at + width], atol=2e-5)
        at += width
    assert at == LENGTH


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_are_computed_as_if_alone(family):
    graphdef, params = make(config_of(family))
    tokens = random_tokens(1)
    segments = jnp.asarray(np.repeat([1, 2, 0], [7, 11, 2])[None])
    positions = jnp.asarray(np.concatenate([np.arange(7), np.arange(11), np.zeros(2, int)])[None])
    packed = states(graphdef, params, tokens, segments, positions)
    np.testing.assert_allclose(packed[:, :7], states(graphdef, params, tokens[:, :7]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 7:18], states(graphdef, params, tokens[:, 7:18]), atol=2e-5)
    assert np.isfinite(packed).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_of_the_whole_row_changes_nothing(family):
    """Against the same parameters with a window of exactly the length, and one beyond it."""
    tokens = random_tokens(1)
    _, params = make(config_of(family))
    results = []
    for window in (LENGTH, 10 * LENGTH, WINDOW):
        graphdef, _ = build.abstract_model(config_of(family, sliding_window=window), "generative")
        results.append(states(graphdef, params, tokens))
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 1e-3
