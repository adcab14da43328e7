"""Our Llama against transformers' LlamaForCausalLM on random weights, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from transformers import LlamaConfig, LlamaForCausalLM

from tests.reference import torch_weights
from vilam3_jax import compat
from vilam3_jax.models.llama import Llama
from vilam3_jax.ops.losses import chunked_cross_entropy

VOCAB, MAX_POSITIONS = 61, 8192


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def pair(heads=6, kv_heads=2, tied=False, theta=10_000.0, hidden=36, mlp=50, head_dim=8, layers=3):
    """(transformers' model, our structure, our parameters) with the same random weights."""
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    torch_weights.randomise(reference)
    cfg = ConfigDict(
        dict(
            vocab_size=VOCAB,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_dim=mlp,
            rope_theta=theta,
            norm_eps=1e-5,
            tie_embeddings=tied,
        )
    )

    def build():
        rngs = compat.nnx.Rngs(0)
        return Llama(cfg, rngs=rngs, dtype="float32", param_dtype="float32", remat="none")

    graphdef, abstract = compat.split(compat.nnx.eval_shape(build))
    params = torch_weights.llama(reference)
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == jax.tree.map(lambda x: x.shape, abstract)
    return reference, graphdef, params


def tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def our_logits(graphdef, params, ids, segments, positions):
    @jax.jit
    def run(params):
        model = compat.merge(graphdef, params)
        return model.logits(
            model(model.embed(jnp.asarray(ids)), jnp.asarray(segments), jnp.asarray(positions))
        )

    return np.asarray(run(params))


@pytest.mark.parametrize(
    "shape",
    [
        dict(heads=6, kv_heads=2),
        dict(heads=3, kv_heads=3, tied=True, hidden=39, mlp=51, head_dim=10),
        dict(heads=4, kv_heads=1, theta=500_000.0),
    ],
    ids=["grouped", "multi-head-tied-odd", "multi-query-long-theta"],
)
def test_logits(shape):
    reference, graphdef, params = pair(**shape)
    ids = tokens(2, 13)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).logits.numpy()
    got = our_logits(graphdef, params, ids, np.ones_like(ids), np.arange(13)[None].repeat(2, 0))
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    assert np.ptp(want) > 1  # the comparison is of something


def test_every_layer_at_far_positions():
    reference, graphdef, params = pair()
    ids = tokens(1, 9)
    positions = 4000 + np.arange(9)[None] * 7
    with torch.no_grad():
        out = reference.model(
            torch.from_numpy(ids), position_ids=torch.from_numpy(positions), output_hidden_states=True
        )
    # transformers' list: embeddings, then each layer's output, the last one already normalised.
    for count in (1, 2, 3):
        cut = {**params, "layers": jax.tree.map(lambda x, n=count: x[:n], params["layers"])}
        if count < 3:
            cut["final_norm"] = {"scale": jnp.ones_like(params["final_norm"]["scale"])}
        model = compat.merge(graphdef, cut)
        run = jax.jit(lambda ids, segments, positions, m=model: m(m.embed(ids), segments, positions))
        got = run(jnp.asarray(ids), jnp.ones((1, 9), int), jnp.asarray(positions))
        want = out.hidden_states[count].numpy()
        if count < 3:
            want = want / np.sqrt(np.square(want).mean(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    reference, graphdef, params = pair()
    ids = tokens(2, 11)
    keep = np.ones((2, 11), int)
    keep[1, :4] = 0
    if side == "right":
        keep = keep[:, ::-1].copy()
    positions = np.maximum(np.cumsum(keep, axis=1) - 1, 0)
    with torch.no_grad():
        want = reference(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(keep),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    got = our_logits(graphdef, params, ids, keep, positions)
    np.testing.assert_allclose(got[keep == 1], want[keep == 1], atol=1e-4, rtol=0)
    assert np.isfinite(got).all()


def test_packed_row_equals_its_samples_alone():
    reference, graphdef, params = pair()
    ids = tokens(1, 15)
    lengths = (4, 8)
    segments = np.repeat([1, 2, 0], [4, 8, 3])[None]
    positions = np.concatenate([np.arange(4), np.arange(8), np.zeros(3, int)])[None]
    got = our_logits(graphdef, params, ids, segments, positions)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        with torch.no_grad():
            want = reference(torch.from_numpy(ids[:, part])).logits.numpy()
        np.testing.assert_allclose(got[:, part], want, atol=1e-4, rtol=0)
        start += length


@pytest.mark.parametrize("tied", [False, True])
def test_gradients(tied):
    reference, graphdef, params = pair(tied=tied)
    ids = tokens(2, 10)
    labels = ids.copy()
    labels[:, :3] = -100
    loss = reference(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
    loss.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    want = torch_weights.llama(reference)

    @jax.jit
    @jax.value_and_grad
    def step(params):
        model = compat.merge(graphdef, params)
        segments = jnp.ones((2, 10), int)
        hidden = model(model.embed(jnp.asarray(ids)), segments, jnp.arange(10)[None].repeat(2, 0))
        weights = jnp.asarray(labels != -100, jnp.float32)
        total, count, _ = chunked_cross_entropy(
            hidden, model.head_kernel(), jnp.asarray(ids), weights, segments, chunk=4
        )
        return total / count

    value, got = step(params)
    assert float(value) == pytest.approx(loss.item(), abs=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0, err_msg=jax.tree_util.keystr(path))
        assert np.any(b)
