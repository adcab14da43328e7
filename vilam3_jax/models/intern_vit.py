"""InternViT (arXiv:2312.14238), the image tower of VILA-1.5-40b (layout of `intern_vit_6b` checkpoints)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.models import families
from vilam3_jax.models import hugging_face as hf
from vilam3_jax.models.hugging_face import KEEP, TRANSPOSE, Layout, TensorRule
from vilam3_jax.models.layers import GeluMLP, Init, RMSNorm, SelfAttention, StackInit, run_stack
from vilam3_jax.models.siglip import (
    TOWER_RULES,
    VISION_SIZES,
    TowerConfig,
    VisionTower,
    normal_table,
    vision_sizes,
)
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

    def __init__(self, cfg: InternVitConfig, **init: Unpack[StackInit]):
        width, eps = cfg.hidden_size, cfg.norm_eps
        scale = jnp.full((*init.get("stack", ()), width), _LAYER_SCALE, init["param_dtype"])
        self.norm1 = RMSNorm(width, eps=eps, **init)
        self.attn = SelfAttention(width, cfg.num_heads, qkv_bias=False, qk_norm_eps=eps, **init)
        self.scale1 = nnx.Param(scale)
        self.norm2 = RMSNorm(width, eps=eps, **init)
        self.mlp = GeluMLP(width, cfg.mlp_dim, approximate=False, **init)
        self.scale2 = nnx.Param(scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        attended = self.attn(self.norm1(x)) * self.scale1[...].astype(x.dtype)
        x = shard(x + attended, "batch", None, "embed")
        output = self.mlp(self.norm2(x)) * self.scale2[...].astype(x.dtype)
        return shard(x + output, "batch", None, "embed")


class InternViT(VisionTower):
    """Image tower with a class token, which is attended to but is not a feature."""

    def __init__(self, cfg: InternVitConfig, *, remat: str, **init: Unpack[Init]):
        super().__init__(cfg, remat=remat, **init)
        self.image_mean, self.image_std = cfg.image_mean, cfg.image_std
        width, stddev = cfg.hidden_size, cfg.hidden_size**-0.5
        self.class_embed = normal_table((1, width), stddev, **init)
        self.pos_embed = normal_table((1 + self.grid**2, width), stddev, **init)
        self.blocks = InternBlock(cfg, stack=(cfg.num_layers,), **init)

    @logical_axes.tower_rules()
    def pixel_features(self, pixels: jax.Array) -> jax.Array:
        """See `VisionTower`."""
        x = (pixels / 255 - jnp.asarray(self.image_mean)) / jnp.asarray(self.image_std)
        x = self.patch_embed(x)
        token = jnp.broadcast_to(self.class_embed[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        x = shard(x, "batch", None, "embed")
        return run_stack(self.blocks, x, remat=self.remat, count=self.num_feature_layers)[:, 1:]


def read_config(values: Mapping[str, Any], where: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Translates OpenGVLab's config.json of an InternViT into a section.

    Raises:
      UserError: an unsupported setting.
    """
    values.get("auto_map")  # OpenGVLab's code, which this module replaces
    hf.refuse(values, where, {"num_channels": (3,), **{key: (value,) for key, value in _SETTINGS.items()}})
    return {
        "type": "intern_vit",
        **hf.read_sizes(values, where, VISION_SIZES),
        "norm_eps": hf.number(values, "layer_norm_eps", where, 1e-6),
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
    embeddings = [
        ("class_embed", "embeddings.class_embedding", hf.LEADING),
        ("pos_embed", "embeddings.position_embedding", hf.LEADING),
    ]
    return [
        *hf.single(to, embeddings),
        *hf.dense(f"{to}patch_embed", "embeddings.patch_embedding", layout=hf.PATCHES),
        *hf.stacked(f"{to}blocks", "encoder.layers", tower.num_layers, rows),
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
