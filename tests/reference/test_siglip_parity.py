"""Our SigLIP towers against transformers' on random weights, in float32."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from tests.reference import torch_weights
from vilam3_jax.models import vila
from vilam3_jax.ops.losses import sigmoid_contrastive_loss

SIZE, PATCH, WIDTH, LAYERS, HEADS, MLP = 31, 6, 36, 3, 3, 50  # 25 patches; a 1-pixel border is dropped
TEXT = dict(vocab_size=40, hidden_size=28, num_layers=2, num_heads=2, mlp_dim=44, max_length=9, norm_eps=1e-6,
            logit_bias=-10.0)  # fmt: skip


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def vision_config():
    return dict(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        attn_implementation="eager",
    )


@cache
def two_towers():
    """(transformers' SiglipModel, our structure, our parameters)."""
    text = dict(
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"],
        num_hidden_layers=TEXT["num_layers"],
        num_attention_heads=TEXT["num_heads"],
        intermediate_size=TEXT["mlp_dim"],
        max_position_embeddings=TEXT["max_length"],
        projection_size=WIDTH,
    )
    reference = SiglipModel(SiglipConfig(text_config=text, vision_config=vision_config()))
    torch_weights.randomise(reference, seed=1)
    state = torch_weights.numpy_state(reference)
    parts = [
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in ("vision_model.", "text_model.")
    ]
    params = {
        "vision_tower": torch_weights.siglip_vision(parts[0], LAYERS),
        "text_tower": torch_weights.siglip_text(parts[1], TEXT["num_layers"]),
        "logit_scale": jnp.asarray(state["logit_scale"][0]),
        "logit_bias": jnp.asarray(state["logit_bias"][0]),
    }
    cfg = ConfigDict(
        dict(
            dtype="float32",
            param_dtype="float32",
            remat="none",
            vision_tower=dict(
                type="siglip",
                image_size=SIZE,
                patch_size=PATCH,
                hidden_size=WIDTH,
                num_layers=LAYERS,
                num_heads=HEADS,
                mlp_dim=MLP,
                norm_eps=1e-6,
                select_layer=-2,
                head=True,
            ),
            text_tower=TEXT,
        )
    )
    graphdef, abstract = vila.abstract_model(cfg, "contrastive")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
    return reference, graphdef, params


def images(count, seed=0):
    """Uint8 images for us; what transformers' processor makes of them for the reference."""
    ours = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    theirs = (ours.astype(np.float32) / 255 - 0.5) / 0.5
    return jnp.asarray(ours), torch.from_numpy(theirs.transpose(0, 3, 1, 2).copy())


def test_every_hidden_state_and_the_pooled_output():
    reference = SiglipVisionModel(SiglipVisionConfig(**vision_config()))
    torch_weights.randomise(reference, seed=2)
    _, graphdef, params = two_towers()
    state = torch_weights.numpy_state(reference)
    params = {**params, "vision_tower": torch_weights.siglip_vision(state, LAYERS)}
    ours, theirs = images(2)
    with torch.no_grad():
        want = reference(theirs, output_hidden_states=True)
    tower, default = (vila.merge(graphdef, params).vision_tower for _ in range(2))
    for state in range(LAYERS):
        tower.num_feature_layers = state
        features = jax.jit(lambda x: tower.features(x))(ours)
        np.testing.assert_allclose(features, want.hidden_states[state], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(jax.jit(default.features)(ours), features)  # select_layer -2
    np.testing.assert_allclose(jax.jit(tower.pooled)(ours), want.pooler_output, atol=2e-5, rtol=0)
    assert float(want.pooler_output.std()) > 0.1


@pytest.mark.parametrize("length", [TEXT["max_length"], 5])
def test_contrastive_logits(length):
    reference, graphdef, params = two_towers()
    ours, theirs = images(3)
    ids = np.random.default_rng(5).integers(0, TEXT["vocab_size"], (4, length))
    with torch.no_grad():
        want = reference(input_ids=torch.from_numpy(ids), pixel_values=theirs)
    model = vila.merge(graphdef, params)
    img = jax.jit(model.vision_tower.pooled)(ours)
    txt = jax.jit(model.text_tower.__call__)(jnp.asarray(ids), jnp.ones(ids.shape, bool))
    img, txt = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (img, txt))
    logits = img @ txt.T * jnp.exp(params["logit_scale"]) + params["logit_bias"]
    np.testing.assert_allclose(logits, want.logits_per_image, atol=1e-4, rtol=0)
    np.testing.assert_allclose(txt, want.text_embeds, atol=1e-5, rtol=0)


def test_loss_and_gradients():
    reference, graphdef, params = two_towers()
    ours, theirs = images(3, seed=3)
    ids = np.random.default_rng(6).integers(0, TEXT["vocab_size"], (3, 6))
    reference.zero_grad()
    logits = reference(input_ids=torch.from_numpy(ids), pixel_values=theirs).logits_per_image
    sign = 2 * torch.eye(3) - 1
    want = -torch.nn.functional.logsigmoid(sign * logits).sum() / 3
    want.backward()

    @jax.jit
    @jax.value_and_grad
    def step(params):
        model = vila.merge(graphdef, params)
        img, txt = model(ours, jnp.asarray(ids), jnp.ones(ids.shape, bool))
        return sigmoid_contrastive_loss(img, txt, model.logit_scale[...], model.logit_bias[...])

    value, got = step(params)
    assert float(value) == pytest.approx(want.item(), rel=1e-5)
    gradient = {name: p.grad for name, p in reference.named_parameters()}
    pairs = [
        (got["logit_scale"], gradient["logit_scale"][0]),
        (got["logit_bias"], gradient["logit_bias"][0]),
        (got["text_tower"]["embed"]["embedding"], gradient["text_model.embeddings.token_embedding.weight"]),
        (
            got["vision_tower"]["patch_embed"]["kernel"].transpose(3, 2, 0, 1),
            gradient["vision_model.embeddings.patch_embedding.weight"],
        ),
        (got["vision_tower"]["head"]["probe"], gradient["vision_model.head.probe"]),
    ]
    for ours_, theirs_ in pairs:
        np.testing.assert_allclose(ours_, theirs_, atol=1e-4 * float(theirs_.abs().max() + 1), rtol=0)
        assert theirs_.abs().max() > 0


def test_masked_padding_equals_the_text_without_it():
    reference, graphdef, params = two_towers()
    ids = np.random.default_rng(7).integers(0, TEXT["vocab_size"], (2, 9))
    lengths = np.array([9, 4])
    valid = np.arange(9) < lengths[:, None]
    text_tower = vila.merge(graphdef, params).text_tower
    got = jax.jit(text_tower.__call__)(jnp.asarray(ids), jnp.asarray(valid))
    for row, length in enumerate(lengths):
        with torch.no_grad():
            want = reference.text_model(input_ids=torch.from_numpy(ids[row : row + 1, :length])).pooler_output
        np.testing.assert_allclose(got[row], want[0], atol=1e-5, rtol=0)
