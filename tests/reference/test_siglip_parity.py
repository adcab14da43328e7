"""Our SigLIP towers against transformers' on random weights."""

from __future__ import annotations

import copy
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.reference import torch_weights
from vilam3_jax.models import build
from vilam3_jax.models.layers import run_stack
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
        attn_implementation="eager",
    )
    reference = SiglipModel(SiglipConfig(text_config=text, vision_config=vision_config()))
    torch_weights.randomise(reference, seed=1)
    graphdef, abstract = structure()
    params = weights_of(torch_weights.numpy_state(reference))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
    return reference, graphdef, params


def structure(dtype="float32"):
    """(structure, shapes of parameters) of our two towers."""
    cfg = ConfigDict(
        dict(
            dtype=dtype,
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
    return build.abstract_model(cfg, "contrastive")


def weights_of(state):
    """Our parameters from the names and shapes of a SiglipModel."""
    vision, text = (
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in ("vision_model.", "text_model.")
    )
    return {
        "vision_tower": torch_weights.siglip_vision(vision, LAYERS),
        "text_tower": torch_weights.siglip_text(text, TEXT["num_layers"]),
        "logit_scale": jnp.asarray(state["logit_scale"][0]),
        "logit_bias": jnp.asarray(state["logit_bias"][0]),
    }


def images(count, seed=0):
    """Uint8 images, and the output of transformers' processor for them."""
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
    tower, default = (build.merge(graphdef, params).vision_tower for _ in range(2))
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
    model = build.merge(graphdef, params)
    img = jax.jit(model.vision_tower.pooled)(ours)
    txt = jax.jit(model.text_tower.__call__)(jnp.asarray(ids), jnp.ones(ids.shape, bool))
    img, txt = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (img, txt))
    logits = img @ txt.T * jnp.exp(params["logit_scale"]) + params["logit_bias"]
    np.testing.assert_allclose(logits, want.logits_per_image, atol=1e-4, rtol=0)
    np.testing.assert_allclose(txt, want.text_embeds, atol=1e-5, rtol=0)


def test_every_layer_of_the_text_tower():
    reference, graphdef, params = two_towers()
    ids = np.random.default_rng(8).integers(0, TEXT["vocab_size"], (3, TEXT["max_length"]))
    with torch.no_grad():
        want = reference.text_model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    tower = build.merge(graphdef, params).text_tower
    run = jax.jit(
        lambda x, count: run_stack(tower.blocks, x, remat="none", count=count),
        static_argnums=1,
    )
    embedded = tower.embed(jnp.asarray(ids)) + tower.pos_embed[...]
    for count in range(TEXT["num_layers"] + 1):
        np.testing.assert_allclose(run(embedded, count), want[count], atol=1e-5, rtol=0)
    assert float(want[-1].std()) > 0.5


def test_loss_and_gradients():
    reference, graphdef, params = two_towers()
    reference = copy.deepcopy(reference)
    ours, theirs = images(3, seed=3)
    ids = np.random.default_rng(6).integers(0, TEXT["vocab_size"], (3, 6))
    logits = reference(input_ids=torch.from_numpy(ids), pixel_values=theirs).logits_per_image
    sign = 2 * torch.eye(3) - 1
    want = -torch.nn.functional.logsigmoid(sign * logits).sum() / 3
    want.backward()
    torch_weights.gradients_as_weights(reference)

    @jax.jit
    @jax.value_and_grad
    def step(params):
        model = build.merge(graphdef, params)
        img, txt = model(ours, jnp.asarray(ids), jnp.ones(ids.shape, bool))
        scalars = model.logit_scale[...], model.logit_bias[...]
        return sigmoid_contrastive_loss(img, txt, *scalars)[0] / 3

    value, got = step(params)
    assert float(value) == pytest.approx(want.item(), rel=1e-5)
    want = weights_of(torch_weights.numpy_state(reference))
    # A key bias shifts all scores of a query equally: its gradient is only rounding error.
    torch_weights.check_gradients(got, want, unused=("attn/k/bias",))


@pytest.mark.slow
def test_bfloat16():
    reference, _, params = two_towers()
    ours, theirs = images(4, seed=5)
    ids = np.random.default_rng(9).integers(0, TEXT["vocab_size"], (4, TEXT["max_length"]))
    low = torch_weights.in_bfloat16(reference)
    model = build.merge(structure("bfloat16")[0], params)
    with torch.no_grad():
        exact = reference(torch.from_numpy(ids), theirs, output_hidden_states=True)
        rounded = low(torch.from_numpy(ids), theirs.bfloat16(), output_hidden_states=True)
    got = (
        jax.jit(model.vision_tower.features)(ours),
        jax.jit(model.vision_tower.pooled)(ours),
        jax.jit(model.text_tower.__call__)(jnp.asarray(ids), jnp.ones(ids.shape, bool)),
    )
    for mine, *pair in zip(got, *map(parts, (rounded, exact)), strict=True):
        assert mine.dtype == jnp.bfloat16
        torch_weights.check_rounding(mine, *pair)


def parts(output):
    vision, text = output.vision_model_output, output.text_model_output
    return vision.hidden_states[-2], vision.pooler_output, text.pooler_output


# Every tensor of a saved SiglipModel.
D, E = WIDTH, TEXT["hidden_size"]
TWO_TOWER_NAMES = {
    "logit_scale": (1,),
    "logit_bias": (1,),
    "text_model.embeddings.token_embedding.weight": (TEXT["vocab_size"], E),
    "text_model.embeddings.position_embedding.weight": (TEXT["max_length"], E),
    "text_model.final_layer_norm.weight": (E,),
    "text_model.final_layer_norm.bias": (E,),
    "text_model.head.weight": (D, E),
    "text_model.head.bias": (D,),
    "vision_model.embeddings.patch_embedding.weight": (D, 3, PATCH, PATCH),
    "vision_model.embeddings.patch_embedding.bias": (D,),
    "vision_model.embeddings.position_embedding.weight": (25, D),
    "vision_model.post_layernorm.weight": (D,),
    "vision_model.post_layernorm.bias": (D,),
    "vision_model.head.probe": (1, 1, D),
    "vision_model.head.attention.in_proj_weight": (3 * D, D),
    "vision_model.head.attention.in_proj_bias": (3 * D,),
    "vision_model.head.attention.out_proj.weight": (D, D),
    "vision_model.head.attention.out_proj.bias": (D,),
    "vision_model.head.layernorm.weight": (D,),
    "vision_model.head.layernorm.bias": (D,),
    "vision_model.head.mlp.fc1.weight": (MLP, D),
    "vision_model.head.mlp.fc1.bias": (MLP,),
    "vision_model.head.mlp.fc2.weight": (D, MLP),
    "vision_model.head.mlp.fc2.bias": (D,),
}
for tower, width, mlp, count in (
    ("vision", D, MLP, LAYERS),
    ("text", E, TEXT["mlp_dim"], TEXT["num_layers"]),
):
    for at in (f"{tower}_model.encoder.layers.{i}." for i in range(count)):
        for name, shape in {
            "layer_norm1": (width,),
            "layer_norm2": (width,),
            **{f"self_attn.{part}": (width, width) for part in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "mlp.fc1": (mlp, width),
            "mlp.fc2": (width, mlp),
        }.items():
            TWO_TOWER_NAMES |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}


def test_names_and_shapes_of_a_saved_two_tower_folder(tmp_path):
    """Tensors of a saved two-tower folder, mapped without the importer."""
    reference, graphdef, _ = two_towers()
    reference.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert {name: value.shape for name, value in state.items()} == TWO_TOWER_NAMES
    params = weights_of(state)
    ours, theirs = images(3, seed=4)
    ids = np.random.default_rng(7).integers(0, TEXT["vocab_size"], (3, TEXT["max_length"]))
    with torch.no_grad():
        want = SiglipModel.from_pretrained(tmp_path)(torch.from_numpy(ids), theirs).logits_per_image
    model = build.merge(graphdef, params)
    img, txt = jax.jit(model.__call__)(ours, jnp.asarray(ids), jnp.ones(ids.shape, bool))
    logits = img @ txt.T * jnp.exp(params["logit_scale"]) + params["logit_bias"]
    np.testing.assert_allclose(logits, want, atol=1e-4, rtol=0)
    assert np.ptp(want.numpy()) > 0.01


def test_siglip2_at_its_own_grid():
    """SigLIP 2 with a flexible grid has the same trunk, with a matmul of flat patches for the convolution.

    The checkpoints of fixed resolution are SiglipModels themselves (transformers issue 36845).
    """
    side = SIZE // PATCH
    config = Siglip2VisionConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=MLP,
        num_patches=side**2, patch_size=PATCH, attn_implementation="eager",
    )  # fmt: skip
    reference = torch_weights.randomise(Siglip2VisionModel(config), seed=3)
    ours, theirs = images(2, seed=6)
    patches = theirs[:, :, : side * PATCH, : side * PATCH].permute(0, 2, 3, 1)
    patches = patches.reshape(2, side, PATCH, side, PATCH, 3).transpose(2, 3).reshape(2, side**2, -1)
    with torch.no_grad():
        want = reference(
            patches,
            pixel_attention_mask=torch.ones(2, side**2, dtype=torch.int64),
            spatial_shapes=torch.tensor([[side, side]] * 2),
            output_hidden_states=True,
        )
    state = torch_weights.numpy_state(reference)
    (name,) = [name for name in state if name.endswith("patch_embedding.weight")]
    state[name] = state[name].reshape(WIDTH, PATCH, PATCH, 3).transpose(0, 3, 1, 2)
    graphdef, params = two_towers()[1:]
    params = {**params, "vision_tower": torch_weights.siglip_vision(state, LAYERS)}
    tower = build.merge(graphdef, params).vision_tower
    np.testing.assert_allclose(jax.jit(tower.features)(ours), want.hidden_states[-2], atol=1e-5, rtol=0)
    np.testing.assert_allclose(jax.jit(tower.pooled)(ours), want.pooler_output, atol=2e-5, rtol=0)


def test_masked_padding_equals_the_text_without_it():
    reference, graphdef, params = two_towers()
    ids = np.random.default_rng(7).integers(0, TEXT["vocab_size"], (2, 9))
    lengths = np.array([9, 4])
    valid = np.arange(9) < lengths[:, None]
    text_tower = build.merge(graphdef, params).text_tower
    got = jax.jit(text_tower.__call__)(jnp.asarray(ids), jnp.asarray(valid))
    for row, length in enumerate(lengths):
        with torch.no_grad():
            want = reference.text_model(input_ids=torch.from_numpy(ids[row : row + 1, :length])).pooler_output
        np.testing.assert_allclose(got[row], want[0], atol=1e-5, rtol=0)
