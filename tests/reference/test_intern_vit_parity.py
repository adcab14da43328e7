"""Our InternViT against transformers' InternVLVisionModel on random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.reference import torch_weights
from vilam3_jax.models.intern_vit import InternViT, InternVitConfig
from vilam3_jax.runtime import compat

LAYERS, WIDTH, SIZE, PATCH = 3, 40, 33, 8  # 16 patches; a 1-pixel border is dropped


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def reference_model():
    return torch_weights.intern_vit_model(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=5,
        intermediate_size=56,
        image_size=(SIZE, SIZE),
        patch_size=(PATCH, PATCH),
    )


def ours(reference, select_layer=-1, remat="none", dtype="float32"):
    """(structure, parameters) of our tower with the reference's weights."""
    cfg = InternVitConfig(
        type="intern_vit",
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=5,
        mlp_dim=56,
        norm_eps=1e-6,
        select_layer=select_layer,
    )

    def build():
        rngs = compat.nnx.Rngs(0)
        return InternViT(cfg, rngs=rngs, dtype=dtype, param_dtype="float32", remat=remat)

    graphdef, abstract = compat.split(compat.nnx.eval_shape(build))
    params = torch_weights.intern_vit(reference)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
    return graphdef, params


def images(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    normal = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return jnp.asarray(pixels), torch.from_numpy(normal.transpose(0, 3, 1, 2).astype(np.float32))


def test_every_layer():
    reference = reference_model()
    pixels, theirs = images(2)
    with torch.no_grad():
        states = reference(theirs, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    for select in range(LAYERS + 1):
        graphdef, params = ours(reference, select)
        got = jax.jit(lambda p, g=graphdef: compat.merge(g, p).features(pixels))(params)
        want = states[select].numpy()[:, 1:]  # without the class token
        assert np.ptp(want) > 1
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0, err_msg=f"hidden state {select}")


def test_gradients():
    reference = reference_model()
    pixels, theirs = images(2, seed=3)
    weights = np.random.default_rng(1).normal(size=(2, (SIZE // PATCH) ** 2, WIDTH)).astype(np.float32)
    out = reference(theirs, output_hidden_states=True).hidden_states[-1][:, 1:]
    (out * torch.from_numpy(weights)).mean().backward()
    graphdef, params = ours(reference, remat="full")
    torch_weights.gradients_as_weights(reference)
    want = torch_weights.intern_vit(reference)
    got = jax.jit(jax.grad(lambda p: (compat.merge(graphdef, p).features(pixels) * weights).mean()))(params)
    torch_weights.check_gradients(got, want)


@pytest.mark.slow
def test_bfloat16():
    reference = reference_model()
    pixels, theirs = images(4, seed=5)
    low = torch_weights.in_bfloat16(reference)
    with torch.no_grad():
        exact, rounded = (
            model(x, output_hidden_states=True).hidden_states[-1][:, 1:]
            for model, x in ((reference, theirs), (low, theirs.bfloat16()))
        )
    graphdef, params = ours(reference, dtype="bfloat16")
    got = jax.jit(lambda p: compat.merge(graphdef, p).features(pixels))(params)
    torch_weights.check_rounding(got, rounded, exact)
