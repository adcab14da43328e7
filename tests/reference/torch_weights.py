"""Converts random weights of transformers' models to our parameter layout, for parity tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Randomises every parameter, including norms and biases, whose zeros and ones would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 25
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + noise * fan_in**-0.5)
    return model.eval()


def in_bfloat16(model: Any) -> torch.nn.Module:
    """A copy of a transformers model that keeps its weights and computes in bfloat16.

    `model.to(bfloat16)` would also round rotary frequencies, unlike loading a checkpoint in bfloat16.
    """
    copy = type(model)._from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def check_rounding(ours: Any, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Asserts that our bfloat16 result is as close to float32 as transformers' bfloat16 result.

    Both round at every layer, but in different places: the errors have the same magnitude, but differ. Ours
    may be 1.5 times theirs, as root mean square over all elements. An operation that wrongly runs in
    bfloat16, such as the angle of a far position, exceeds that many times over.
    """
    want = exact.numpy()
    low = theirs.float().numpy()
    got = np.asarray(ours, np.float32)
    assert got.shape == want.shape

    def error(x: np.ndarray) -> float:
        return float(np.sqrt(np.square(x - want).mean()))

    assert error(low) > 1e-4 * want.std()
    assert error(got) <= 1.5 * error(low), f"{error(got):.3g} against transformers' {error(low):.3g}"


def gradients_as_weights(model: torch.nn.Module) -> None:
    """Replaces each parameter by its gradient, so that gradients convert like weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def check_gradients(ours: Any, theirs: Any, unused: tuple[str, ...] = ()) -> None:
    """Asserts that two trees of gradients agree to 1e-4, and vanish only in paths with an `unused`."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, got), want in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=0, err_msg=name)
        size = float(np.abs(want).max())
        assert (size < 1e-6) if any(part in name for part in unused) else (size > 1e-3), f"{name}: {size}"


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def linear(state: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    out = {"kernel": jnp.asarray(state[f"{name}.weight"].T)}
    if f"{name}.bias" in state:
        out["bias"] = jnp.asarray(state[f"{name}.bias"])
    return out


def norm(state: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    out = {"scale": jnp.asarray(state[f"{name}.weight"])}
    if f"{name}.bias" in state:
        out["bias"] = jnp.asarray(state[f"{name}.bias"])
    return out


def stack(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks equal nested dicts along a new leading axis."""
    first = layers[0]
    if not isinstance(first, dict):
        return jnp.stack(layers)
    return {key: stack([layer[key] for layer in layers]) for key in first}


def llama(model: Any) -> dict[str, Any]:
    """LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM -> the `llm` subtree."""
    state = numpy_state(model)

    def layer(i: int) -> dict[str, Any]:
        at = f"model.layers.{i}."
        attention = {n: linear(state, f"{at}self_attn.{n}_proj") for n in "qkvo"}
        if f"{at}self_attn.q_norm.weight" in state:
            attention |= {f"{n}_norm": norm(state, f"{at}self_attn.{n}_norm") for n in "qk"}
        return {
            "attn_norm": norm(state, at + "input_layernorm"),
            "mlp_norm": norm(state, at + "post_attention_layernorm"),
            "attn": attention,
            "mlp": {n: linear(state, f"{at}mlp.{n}_proj") for n in ("gate", "up", "down")},
        }

    out = {
        "embed": {"embedding": jnp.asarray(state["model.embed_tokens.weight"])},
        "layers": stack([layer(i) for i in range(model.config.num_hidden_layers)]),
        "final_norm": norm(state, "model.norm"),
    }
    if not model.config.tie_word_embeddings:
        out["lm_head"] = linear(state, "lm_head")
    return out


def _mlp(state: dict[str, np.ndarray], at: str) -> dict[str, Any]:
    return {n: linear(state, f"{at}.{n}") for n in ("fc1", "fc2")}


def _blocks(state: dict[str, np.ndarray], at: str, count: int) -> dict[str, Any]:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}

    def block(i: int) -> dict[str, Any]:
        here = f"{at}encoder.layers.{i}."
        return {
            "norm1": norm(state, here + "layer_norm1"),
            "norm2": norm(state, here + "layer_norm2"),
            "attn": {ours: linear(state, f"{here}self_attn.{theirs}") for ours, theirs in names.items()},
            "mlp": _mlp(state, here + "mlp"),
        }

    return stack([block(i) for i in range(count)])


def _prefix(state: dict[str, np.ndarray], leaf: str) -> str:
    """The prefix of the only name that ends with `leaf`; it differs between versions of transformers."""
    (name,) = [n for n in state if n.endswith(leaf)]
    return name.removesuffix(leaf)


def siglip_vision(state: dict[str, np.ndarray], layers: int) -> dict[str, Any]:
    """SiglipVisionModel (or the vision part of SiglipModel) -> the `vision_tower` subtree."""
    at = _prefix(state, "embeddings.patch_embedding.weight")
    width = state[at + "post_layernorm.weight"].shape[0]
    packed = state[at + "head.attention.in_proj_weight"].reshape(3, width, width)
    packed_bias = state[at + "head.attention.in_proj_bias"].reshape(3, width)
    attention = {
        n: {"kernel": jnp.asarray(packed[i].T), "bias": jnp.asarray(packed_bias[i])}
        for i, n in enumerate("qkv")
    }
    attention["o"] = linear(state, at + "head.attention.out_proj")
    return {
        "patch_embed": {
            "kernel": jnp.asarray(state[at + "embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)),
            "bias": jnp.asarray(state[at + "embeddings.patch_embedding.bias"]),
        },
        "pos_embed": jnp.asarray(state[at + "embeddings.position_embedding.weight"]),
        "blocks": _blocks(state, at, layers),
        "post_norm": norm(state, at + "post_layernorm"),
        "head": {
            "probe": jnp.asarray(state[at + "head.probe"]),
            "attn": attention,
            "norm": norm(state, at + "head.layernorm"),
            "mlp": _mlp(state, at + "head.mlp"),
        },
    }


def siglip_text(state: dict[str, np.ndarray], layers: int) -> dict[str, Any]:
    """SiglipTextModel (or the text part of SiglipModel) -> the `text_tower` subtree."""
    at = _prefix(state, "embeddings.token_embedding.weight")
    return {
        "embed": {"embedding": jnp.asarray(state[at + "embeddings.token_embedding.weight"])},
        "pos_embed": jnp.asarray(state[at + "embeddings.position_embedding.weight"]),
        "blocks": _blocks(state, at, layers),
        "final_norm": norm(state, at + "final_layer_norm"),
        "head": linear(state, at + "head"),
    }


def projector(modules: torch.nn.Sequential) -> dict[str, Any]:
    """LayerNorms and Linears in the order of use -> the `projector` subtree."""
    state = numpy_state(modules)
    out: dict[str, Any] = {}
    for kind, stem, take in ((torch.nn.LayerNorm, "norm", norm), (torch.nn.Linear, "fc", linear)):
        numbers = [i for i, module in enumerate(modules) if isinstance(module, kind)]
        out |= {f"{stem}{count}": take(state, str(i)) for count, i in enumerate(numbers, 1)}
    return out


def intern_vit_model(**sizes: Any) -> torch.nn.Module:
    """transformers' InternVLVisionModel with the settings of InternViT-6B and random weights."""
    config = transformers.InternVLVisionConfig(
        norm_type="rms_norm",
        use_qk_norm=True,
        attention_bias=False,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        use_absolute_position_embeddings=True,
        attn_implementation="eager",
        **sizes,
    )
    return randomise(transformers.InternVLVisionModel(config), seed=2)


def intern_vit(model: Any) -> dict[str, Any]:
    """InternVLVisionModel -> the `vision_tower` subtree."""
    state = numpy_state(model)

    def block(i: int) -> dict[str, Any]:
        at = f"encoder.layer.{i}."
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "projection_layer"}
        attention = {ours: linear(state, f"{at}attention.{theirs}") for ours, theirs in names.items()}
        attention |= {f"{n}_norm": norm(state, f"{at}attention.{n}_norm") for n in "qk"}
        return {
            "norm1": norm(state, at + "layernorm_before"),
            "norm2": norm(state, at + "layernorm_after"),
            "attn": attention,
            "scale1": jnp.asarray(state[at + "lambda_1"]),
            "scale2": jnp.asarray(state[at + "lambda_2"]),
            "mlp": _mlp(state, at + "mlp"),
        }

    return {
        "class_embed": jnp.asarray(state["embeddings.cls_token"][0]),
        "pos_embed": jnp.asarray(state["embeddings.position_embeddings"][0]),
        "patch_embed": {
            "kernel": jnp.asarray(
                state["embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
            ),
            "bias": jnp.asarray(state["embeddings.patch_embeddings.projection.bias"]),
        },
        "blocks": stack([block(i) for i in range(model.config.num_hidden_layers)]),
    }
