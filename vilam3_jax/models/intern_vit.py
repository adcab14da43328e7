"""InternViT (arXiv:2312.14238), the image tower of VILA-1.5-40b (layout of `intern_vit_6b` checkpoints)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.models import families
from vilam3_jax.models.hugging_face import (
    KEEP,
    LEADING,
    PATCHES,
    TRANSPOSE,
    Layout,
    TensorRule,
    number,
    refuse,
    size,
    stacked,
)
from vilam3_jax.models.layers import GeluMLP, RMSNorm, SelfAttention, run_stack
from vilam3_jax.models.siglip import TOWER_RULES, PatchEmbed, TowerConfig, check_images, vision_sizes
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard

_LAYER_SCALE = 0.1

# Settings that all of OpenGVLab's 6B models have.
_SETTINGS = {"hidden_act": "gelu", "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}


@dataclasses.dataclass(frozen=True)
class InternVitConfig(TowerConfig):
    """The section `model.vision_tower` of an InternViT."""

    select_layer: int = -1
    # Statistics of ImageNet, with which the released tower was trained.
    image_mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    image_std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)


class InternBlock(nnx.Module):
    """Pre-norm block whose two branches are scaled per channel (LayerScale, arXiv:2103.17239).

    The checkpoint's single `qkv` matrix is split in three, so that each can be sharded by heads.
    """

    def __init__(
        self, cfg: InternVitConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: Any, param_dtype: Any
    ):
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, stack=stack)
        width, eps = cfg.hidden_size, cfg.norm_eps
        self.norm1 = RMSNorm(width, eps=eps, **kwargs)
        self.attn = SelfAttention(width, cfg.num_heads, qkv_bias=False, qk_norm_eps=eps, rngs=rngs, **kwargs)
        self.scale1 = nnx.Param(jnp.full((*stack, width), _LAYER_SCALE, param_dtype))
        self.norm2 = RMSNorm(width, eps=eps, **kwargs)
        self.mlp = GeluMLP(width, cfg.mlp_dim, approximate=False, rngs=rngs, **kwargs)
        self.scale2 = nnx.Param(jnp.full((*stack, width), _LAYER_SCALE, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        attended = self.attn(self.norm1(x)) * self.scale1[...].astype(x.dtype)
        x = shard(x + attended, "batch", None, "embed")
        moved = self.mlp(self.norm2(x)) * self.scale2[...].astype(x.dtype)
        return shard(x + moved, "batch", None, "embed")


class InternViT(nnx.Module):
    """Image tower with a class token, which is attended to and is not a feature."""

    def __init__(self, cfg: InternVitConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str):
        self.image_size = cfg.image_size
        self.grid = cfg.image_size // cfg.patch_size
        self.width = cfg.hidden_size
        self.remat = remat
        self.image_mean, self.image_std = cfg.image_mean, cfg.image_std
        self.num_feature_layers = cfg.feature_layers
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.hidden_size, **kwargs)
        stddev = cfg.hidden_size**-0.5
        token = jax.random.normal(rngs.params(), (1, cfg.hidden_size), param_dtype)
        self.class_embed = nnx.Param(token * stddev)
        table = jax.random.normal(rngs.params(), (1 + self.grid**2, cfg.hidden_size), param_dtype)
        self.pos_embed = nnx.Param(table * stddev)
        self.blocks = InternBlock(cfg, stack=(cfg.num_layers,), **kwargs)

    def features(self, images: jax.Array) -> jax.Array:
        """Patch features: uint8 [N, S, S, 3] -> [N, T, D], hidden state `select_layer`, no class token.

        There is no norm after it, and later blocks are not computed.
        """
        check_images(images, self.image_size)
        return self.pixel_features(images.astype(jnp.float32))

    @logical_axes.tower_rules()
    def pixel_features(self, pixels: jax.Array) -> jax.Array:
        """`features` of interpolated pixels: float32 [N, S, S, 3] on the scale of 0..255."""
        x = (pixels / 255 - jnp.asarray(self.image_mean)) / jnp.asarray(self.image_std)
        x = self.patch_embed(x)
        token = jnp.broadcast_to(self.class_embed[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        x = shard(x, "batch", None, "embed")
        return run_stack(self.blocks, x, remat=self.remat, count=self.num_feature_layers)[:, 1:]


def read_config(values: Mapping[str, Any], where: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Translates OpenGVLab's config.json of an InternViT into a section.

    Raises:
      UserError: a setting that this tower does not have.
    """
    values.get("auto_map")  # OpenGVLab's code, which this module implements
    refuse(values, where, {"num_channels": (3,), **{key: (value,) for key, value in _SETTINGS.items()}})
    return {
        "type": "intern_vit",
        "image_size": size(values, "image_size", where),
        "patch_size": size(values, "patch_size", where),
        "hidden_size": size(values, "hidden_size", where),
        "num_layers": size(values, "num_hidden_layers", where),
        "num_heads": size(values, "num_attention_heads", where),
        "mlp_dim": size(values, "intermediate_size", where),
        "norm_eps": number(values, "layer_norm_eps", where, 1e-6),
    }


def write_config(tower: InternVitConfig, dtype: str) -> dict[str, Any]:
    """The config.json of an InternViT; `read_config` reads it back."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **vision_sizes(tower, dtype),
        **_SETTINGS,
    }


def tensors(tower: InternVitConfig) -> list[TensorRule]:
    """OpenGVLab's tensors; query, key and value are one matrix there."""
    to = "vision_tower/"
    rows = [
        ("norm1/scale", "norm1.weight", KEEP),
        ("norm2/scale", "norm2.weight", KEEP),
        ("scale1", "ls1", KEEP),
        ("scale2", "ls2", KEEP),
        *(
            (f"attn/{name}/kernel", "attn.qkv.weight", Layout(axes=(1, 0), part=i, parts=3))
            for i, name in enumerate("qkv")
        ),
        ("attn/q_norm/scale", "attn.q_norm.weight", KEEP),
        ("attn/k_norm/scale", "attn.k_norm.weight", KEEP),
        ("attn/o/kernel", "attn.proj.weight", TRANSPOSE),
        ("attn/o/bias", "attn.proj.bias", KEEP),
        *((f"mlp/{name}/kernel", f"mlp.{name}.weight", TRANSPOSE) for name in ("fc1", "fc2")),
        *((f"mlp/{name}/bias", f"mlp.{name}.bias", KEEP) for name in ("fc1", "fc2")),
    ]
    return [
        TensorRule(f"{to}class_embed", ("embeddings.class_embedding",), LEADING),
        TensorRule(f"{to}pos_embed", ("embeddings.position_embedding",), LEADING),
        TensorRule(f"{to}patch_embed/kernel", ("embeddings.patch_embedding.weight",), PATCHES),
        TensorRule(f"{to}patch_embed/bias", ("embeddings.patch_embedding.bias",), KEEP),
        *stacked(f"{to}blocks", "encoder.layers", tower.num_layers, rows),
    ]


FAMILY = families.ModelFamily(
    name="intern_vit",
    component="vision_tower",
    config=InternVitConfig,
    module=InternViT,
    parameter_rules=TOWER_RULES,
    hugging_face=families.HuggingFaceLayout(
        model_types=("intern_vit_6b",),
        read_config=read_config,
        write_config=write_config,
        tensors=tensors,
        preprocessor=lambda tower: {"image_processor_type": "InternVisionPreprocessor"},
    ),
    patches=lambda tower: (tower.image_size // tower.patch_size) ** 2 + 1,
)
