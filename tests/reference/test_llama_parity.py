"""Our Llama against transformers' Llama, Qwen2 and Qwen3 on random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.reference import torch_weights
from vilam3_jax.models.decoder import rope_tables
from vilam3_jax.models.llama import Llama, LlamaConfig
from vilam3_jax.ops.attention import MaskInfo, attention
from vilam3_jax.ops.losses import chunked_cross_entropy
from vilam3_jax.runtime import compat

VOCAB, MAX_POSITIONS = 61, 8192


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
# name -> (transformers' class, shared sizes, transformers' keys, our keys)
VARIANTS = {
    "grouped": ("Llama", {}, {}, {}),
    "multi-head, tied, odd": (
        "Llama",
        dict(heads=3, kv_heads=3, tied=True, hidden=39, mlp=51, head_dim=10),
        {},
        {},
    ),
    "multi-query, long theta": ("Llama", dict(heads=4, kv_heads=1, theta=500_000.0), {}, {}),
    "Llama 3.1": (
        "Llama",
        {},
        dict(rope_type="llama3", original_max_position_embeddings=512, **LLAMA3_ROPE),
        dict(rope_scaling=dict(type="llama3", original_max_positions=512, **LLAMA3_ROPE)),
    ),
    "linear rope": (
        "Llama",
        {},
        dict(rope_type="linear", factor=3.0),
        dict(rope_scaling=dict(type="linear", factor=3.0)),
    ),
    "biases": ("Llama", dict(attention_bias=True), {}, dict(qkv_bias=True, o_bias=True)),
    "Qwen2": ("Qwen2", dict(head_dim=6), {}, dict(qkv_bias=True)),
    "Qwen3": ("Qwen3", dict(head_dim=10), {}, dict(qk_norm=True)),
}


def pair(variant="grouped", layers=3):
    """(transformers' model, our config, our parameters) with the same random weights."""
    family, changes, rope, ours = VARIANTS[variant]
    size = dict(heads=6, kv_heads=2, tied=False, theta=10_000.0, hidden=36, mlp=50, head_dim=8) | changes
    theirs = dict(
        vocab_size=VOCAB,
        hidden_size=size["hidden"],
        intermediate_size=size["mlp"],
        num_hidden_layers=layers,
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": size["theta"], **rope},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=size["tied"],
        attn_implementation="eager",
    )
    if family != "Qwen2":  # Qwen2 uses hidden_size / num_attention_heads
        theirs["head_dim"] = size["head_dim"]
    if "attention_bias" in size:
        theirs["attention_bias"] = True
    config = getattr(transformers, f"{family}Config")(**theirs)
    reference = torch_weights.randomise(getattr(transformers, f"{family}ForCausalLM")(config))
    cfg = LlamaConfig(
        type="llama",
        vocab_size=VOCAB,
        hidden_size=size["hidden"],
        num_layers=layers,
        num_heads=size["heads"],
        num_kv_heads=size["kv_heads"],
        head_dim=size["head_dim"],
        mlp_dim=size["mlp"],
        rope_theta=size["theta"],
        norm_eps=1e-5,
        tie_embeddings=size["tied"],
        **ours,
    )
    params = torch_weights.llama(reference)
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == jax.tree.map(lambda x: x.shape, structure(cfg)[1])
    return reference, cfg, params


def structure(cfg, dtype="float32"):
    """(structure, shapes of parameters)."""

    def build():
        rngs = compat.nnx.Rngs(0)
        return Llama(cfg, rngs=rngs, dtype=dtype, param_dtype="float32", remat="none")

    return compat.split(compat.nnx.eval_shape(build))


def tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def our_logits(cfg, params, ids, segments, positions, dtype="float32"):
    graphdef, _ = structure(cfg, dtype)

    @jax.jit
    def run(params):
        model = compat.merge(graphdef, params)
        return model.logits(
            model(model.embed(jnp.asarray(ids)), jnp.asarray(segments), jnp.asarray(positions))
        )

    return np.asarray(run(params))


def some_fast(names, *fast):
    """Test parameters; all but `fast` are marked slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def far(rows, length):
    """Positions from 3,990 on, in steps of seven."""
    return 3990 + 7 * np.arange(length)[None].repeat(rows, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_and_the_logits_at_far_positions(variant):
    reference, cfg, params = pair(variant)
    ids, positions = tokens(2, 13), far(2, 13)
    outputs = []
    for layer in reference.model.layers:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        want = reference(torch.from_numpy(ids), position_ids=torch.from_numpy(positions)).logits
    graphdef, _ = structure(cfg)

    @jax.jit
    def run(params):
        """The outputs of all layers, and the logits."""
        model = compat.merge(graphdef, params)
        layer_def, layers = compat.split(model.layers)
        (frequencies,) = model.frequencies
        rope = rope_tables(jnp.asarray(positions), np.asarray(frequencies, np.float32))
        segments = jnp.ones_like(ids)

        def attend(q, k, v):
            return attention(q, k, v, MaskInfo(segments, segments, causal=True)), None

        def body(x, layer):
            x, _ = compat.merge(layer_def, layer)(x, rope, attend)
            return x, x

        x, states = jax.lax.scan(body, model.embed(jnp.asarray(ids)), layers)
        return states, model.logits(model.final_norm(x))

    states, logits = run(params)
    for number, (got, theirs) in enumerate(zip(states, outputs, strict=True)):
        np.testing.assert_allclose(got, theirs.numpy(), atol=1e-5, rtol=0, err_msg=f"layer {number}")
    np.testing.assert_allclose(logits, want.numpy(), atol=1e-4, rtol=0)
    assert np.ptp(want.numpy()) > 1  # not trivially equal


@pytest.mark.parametrize("variant", some_fast(VARIANTS, "grouped", "Qwen2"))
def test_logits_and_gradients(variant):
    reference, cfg, params = pair(variant)
    ids, positions = tokens(2, 10), far(2, 10)
    labels = ids.copy()
    labels[:, :3] = -100
    out = reference(
        torch.from_numpy(ids), position_ids=torch.from_numpy(positions), labels=torch.from_numpy(labels)
    )
    out.loss.backward()
    torch_weights.gradients_as_weights(reference)
    graphdef, _ = structure(cfg)

    @jax.jit
    def step(params):
        def loss(params):
            model = compat.merge(graphdef, params)
            segments = jnp.ones((2, 10), int)
            hidden = model(model.embed(jnp.asarray(ids)), segments, jnp.asarray(positions))
            weights = jnp.asarray(labels != -100, jnp.float32)
            total, count, _ = chunked_cross_entropy(
                hidden, model.head_kernel(), jnp.asarray(ids), weights, segments, chunk=4
            )
            return total / count, model.logits(hidden)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, logits), got = step(params)
    np.testing.assert_allclose(logits, out.logits.detach().numpy(), atol=1e-4, rtol=0)
    assert float(value) == pytest.approx(out.loss.item(), abs=1e-5)
    torch_weights.check_gradients(got, torch_weights.llama(reference))


@pytest.mark.parametrize("variant", some_fast(["grouped", "Llama 3.1", "Qwen2", "Qwen3"], "Llama 3.1"))
def test_bfloat16(variant):
    reference, cfg, params = pair(variant, layers=6)
    ids, positions = tokens(2, 60), far(2, 60)
    with torch.no_grad():
        exact, low = (
            model(torch.from_numpy(ids), position_ids=torch.from_numpy(positions)).logits
            for model in (reference, torch_weights.in_bfloat16(reference))
        )
    got = our_logits(cfg, params, ids, np.ones_like(ids), positions, dtype="bfloat16")
    torch_weights.check_rounding(got, low, exact)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    reference, cfg, params = pair()
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
    got = our_logits(cfg, params, ids, keep, positions)
    np.testing.assert_allclose(got[keep == 1], want[keep == 1], atol=1e-4, rtol=0)
    assert np.isfinite(got).all()


def test_packed_row_equals_its_samples_alone():
    reference, cfg, params = pair()
    ids = tokens(1, 15)
    lengths = (4, 8)
    segments = np.repeat([1, 2, 0], [4, 8, 3])[None]
    positions = np.concatenate([np.arange(4), np.arange(8), np.zeros(3, int)])[None]
    got = our_logits(cfg, params, ids, segments, positions)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        with torch.no_grad():
            want = reference(torch.from_numpy(ids[:, part])).logits.numpy()
        np.testing.assert_allclose(got[:, part], want, atol=1e-4, rtol=0)
        start += length
