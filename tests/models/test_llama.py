"""Llama: cached and full forward agree, LoRA, rematerialisation, packing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.tiny_model import make, model_config
from vilam3_jax.errors import UserError
from vilam3_jax.models import build
from vilam3_jax.models.layers import Linear


def full(graphdef, params, tokens, segments=None, positions=None):
    """Hidden states of whole rows."""
    length = tokens.shape[1]
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape) if positions is None else positions
    return jax.jit(lambda params: text_states(graphdef, params, tokens, segments, positions))(params)


def text_states(graphdef, params, tokens, segments, positions):
    llm = build.merge(graphdef, params).llm
    return llm(llm.embed(tokens), segments, positions)


def random_tokens(rows, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 41, (rows, length)))


def test_ragged_prefill_and_steps_equal_the_full_forward():
    """Prefills chunks of rows with different true lengths, then steps up to the last slot of the cache."""
    graphdef, params = make(model_config())
    length = 14
    tokens = random_tokens(2, length)
    want = np.asarray(full(graphdef, params, tokens))

    @jax.jit
    def extend(params, chunk, at, cache):
        llm = build.merge(graphdef, params).llm
        positions = at[:, None] + jnp.arange(chunk.shape[1])
        return llm.forward_cached(llm.embed(chunk), positions, cache, at)

    cache = build.merge(graphdef, params).llm.init_cache(2, length)
    at = np.zeros(2, int)
    # The last chunk's padding reaches beyond the cache and must not overwrite real slots.
    for width, true_lengths in ((6, (6, 2)), (6, (1, 6)), (1, (1, 1)), (1, (1, 1)), (6, (5, 4))):
        chunk = np.full((2, width), 40)
        for row, n in enumerate(true_lengths):
            chunk[row, :n] = tokens[row, at[row] : at[row] + n]
        hidden, cache = extend(params, jnp.asarray(chunk), jnp.asarray(at), cache)
        for row, n in enumerate(true_lengths):
            np.testing.assert_allclose(hidden[row, :n], want[row, at[row] : at[row] + n], atol=1e-5)
            at[row] += n
    assert list(at) == [14, 14]


def test_cache_keeps_the_rows_apart():
    graphdef, params = make(model_config())
    llm = build.merge(graphdef, params).llm

    @jax.jit
    def run(tokens):
        positions = jnp.arange(4)[None].repeat(2, 0)
        return llm.forward_cached(llm.embed(tokens), positions, llm.init_cache(2, 6), jnp.zeros(2, int))[0]

    tokens = random_tokens(2, 4)
    one, two = run(tokens), run(tokens.at[1].set(3))
    np.testing.assert_array_equal(one[0], two[0])
    assert np.abs(one[1] - two[1]).max() > 0


def test_packed_samples_do_not_see_each_other():
    graphdef, params = make(model_config())
    tokens = random_tokens(1, 100)
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [30, 45, 20, 5])[None])
    positions = jnp.asarray(
        np.concatenate([np.arange(30), np.arange(45), np.arange(20), np.zeros(5, int)])[None]
    )
    before = np.asarray(full(graphdef, params, tokens, segments, positions))
    other = jnp.where(segments == 2, (tokens + 5) % 41, tokens)
    after = np.asarray(full(graphdef, params, other, segments, positions))
    inside = np.asarray(segments == 2)
    np.testing.assert_array_equal(before[~inside], after[~inside])
    assert np.abs(before[inside] - after[inside]).max() > 0
    assert np.isfinite(before).all()


def test_an_adapter_is_a_weight_change():
    graphdef, params = make(model_config(lora_rank=3))
    tokens = random_tokens(2, 7)
    adapted = full(graphdef, params, tokens)
    attn, mlp = params["llm"]["layers"]["attn"], params["llm"]["layers"]["mlp"]
    assert {n for n in "qkvo" if "lora_a" in attn[n]} == {"q", "v"}
    assert {n for n in ("gate", "up", "down") if "lora_a" in mlp[n]} == {"down"}
    for leaf in (attn["q"], attn["v"], mlp["down"]):
        leaf["kernel"] += 8.0 / 3 * leaf.pop("lora_a") @ leaf.pop("lora_b")
    plain, _ = build.abstract_model(model_config(), "generative")
    np.testing.assert_allclose(adapted, full(plain, params, tokens), atol=2e-5)


def test_a_fresh_adapter_does_nothing_and_moves_no_other_draw():
    def two_layers(rank):
        rngs = nnx.Rngs(params=0, lora=1)
        sizes = dict(rngs=rngs, dtype="float32", param_dtype="float32")
        return [Linear(4, 5, lora_rank=n, **sizes) for n in (rank, 0)]

    adapted, plain = two_layers(2), two_layers(0)
    for a, b in zip(adapted, plain, strict=True):
        np.testing.assert_array_equal(a.kernel[...], b.kernel[...])
    assert np.any(adapted[0].lora_a[...]) and not np.any(adapted[0].lora_b[...])
    x = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(adapted[0](x), plain[0](x))


def test_rematerialisation_changes_no_gradient_but_what_is_kept():
    cfg = model_config()
    _, params = make(cfg)
    tokens = random_tokens(2, 9)

    def compiled(remat):
        cfg.remat = remat
        graphdef, _ = build.abstract_model(cfg, "generative")

        def loss(p):
            return jnp.square(
                text_states(graphdef, p, tokens, jnp.ones_like(tokens), jnp.arange(9)[None])
            ).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile()

    programs = [compiled(remat) for remat in ("none", "qkv+mlp", "full")]
    plain, *saving = [jax.tree.leaves(program(params)) for program in programs]
    for gradients in saving:
        for a, b in zip(plain, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    none, tagged, full = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert full < tagged < none


def test_unknown_settings_are_refused():
    cfg = model_config(lora_rank=2, lora_targets=("q", "query"))
    with pytest.raises(UserError, match="query"):
        build.abstract_model(cfg, "generative")
    with pytest.raises(UserError, match="num_kv_heads=3"):
        build.abstract_model(model_config(num_kv_heads=3), "generative")
    cfg = model_config()
    cfg.remat = "attention"
    graphdef, params = make(cfg)
    with pytest.raises(UserError, match=r"model\.remat='attention'"):
        full(graphdef, params, random_tokens(1, 3))
