"""A model of a few thousand parameters, shared by the tests of models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vilam3_jax.models import build


def model_config(**llm: Any) -> ConfigDict:
    """A tower of 5 x 5 patches (9 tokens an image), a 3-layer Llama; `llm` overrides keys of the latter."""
    return ConfigDict(
        dict(
            dtype="float32",
            param_dtype="float32",
            remat="none",
            vision_tower=dict(
                type="siglip",
                image_size=20,
                patch_size=4,
                hidden_size=16,
                num_layers=3,
                num_heads=2,
                mlp_dim=24,
                norm_eps=1e-6,
                select_layer=-2,
                head=True,
            ),
            text_tower=dict(
                vocab_size=41,
                hidden_size=12,
                num_layers=2,
                num_heads=2,
                mlp_dim=20,
                max_length=8,
                norm_eps=1e-6,
                logit_bias=-10.0,
            ),
            projector=dict(type="mlp_downsample", token_order="column"),
            llm={
                **dict(
                    type="llama",
                    vocab_size=41,
                    hidden_size=24,
                    num_layers=3,
                    num_heads=4,
                    num_kv_heads=2,
                    head_dim=6,
                    mlp_dim=40,
                    rope_theta=10_000.0,
                    norm_eps=1e-5,
                    tie_embeddings=True,
                    lora_rank=0,
                    lora_alpha=8.0,
                    lora_targets=("q", "v", "down"),
                ),
                **llm,
            },
        )
    )


def make(cfg: ConfigDict, task: str = "generative", seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """(structure, random parameters), biases and norms too; drawn by NumPy, because compiling is slower."""
    graphdef, abstract = build.abstract_model(cfg, task)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        fan_in = leaf.shape[-2] if name in ("kernel", "lora_a", "lora_b") else 25
        noise = rng.normal(size=leaf.shape) * fan_in**-0.5
        return jnp.asarray(noise + (name == "scale"), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, abstract)
