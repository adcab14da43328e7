"""SigLIP's image and text towers (arXiv:2303.15343; layout of Hugging Face's SiglipModel)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models import families
from vilam3_jax.models import hugging_face as hf
from vilam3_jax.models.hugging_face import KEEP, TRANSPOSE, Layout, TensorRule
from vilam3_jax.models.layers import (
    Embed,
    EncoderBlock,
    GeluMLP,
    Init,
    LayerNorm,
    Linear,
    SelfAttention,
    run_stack,
)
from vilam3_jax.ops.attention import row_length
from vilam3_jax.runtime.settings import Section, setting
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard
from vilam3_jax.sharding.matmul import einsum


@dataclasses.dataclass(frozen=True)
class TowerConfig(Section):
    """Fields of the sections of all vision towers.

    Attributes:
      type: name of the family.
      image_size: S, side of an input in pixels.
      patch_size: side of a patch in pixels.
      hidden_size: width D.
      num_layers: number of blocks.
      num_heads: attention heads of a block.
      mlp_dim: hidden width of a block's MLP.
      norm_eps: added to the variance in normalisation layers.
      select_layer: the hidden state that is the feature map; 0 is the embedding, i the output of block i.
    """

    key = "model.vision_tower"
    type: str
    image_size: int = setting(at_least=1)
    patch_size: int = setting(at_least=1)
    hidden_size: int = setting(at_least=1)
    num_layers: int = setting(at_least=1)
    num_heads: int = setting(at_least=1)
    mlp_dim: int = setting(at_least=1)
    norm_eps: float = setting(default=1e-6, at_least=0)
    select_layer: int = -2
    # Mean and standard deviation of the tower's input, for pixels in 0..1.
    image_mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    image_std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour of the padding of mode 'pad', the tower's mean pixel, rounded down as in VILA."""
        red, green, blue = (int(255 * mean) for mean in self.image_mean)
        return red, green, blue

    @property
    def feature_layers(self) -> int:
        """Number of blocks before hidden state `select_layer`; UserError if there is no such state."""
        states = self.num_layers + 1
        if not -states <= self.select_layer < states:
            raise UserError(
                f"model.vision_tower.select_layer={self.select_layer} is not one of the {states} hidden "
                f"states; use {-states} to {states - 1}"
            )
        return self.select_layer % states


@dataclasses.dataclass(frozen=True)
class SiglipConfig(TowerConfig):
    """The section `model.vision_tower` of a SigLIP.

    Attributes:
      head: whether there is the attention-pooling head of contrastive training.
    """

    head: bool = True


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig(Section):
    """The section `model.text_tower`.

    Attributes:
      vocab_size: number of token embeddings.
      max_length: largest number of tokens of a text.
      hidden_size: width D.
      num_layers: number of blocks.
      num_heads: attention heads of a block.
      mlp_dim: hidden width of a block's MLP.
      norm_eps: added to the variance in normalisation layers.
      logit_bias: initial bias of the contrastive logits.
    """

    key = "model.text_tower"
    vocab_size: int = setting(default=32_000, at_least=1)
    max_length: int = setting(default=64, at_least=1)
    hidden_size: int = setting(default=768, at_least=1)
    num_layers: int = setting(default=12, at_least=1)
    num_heads: int = setting(default=12, at_least=1)
    mlp_dim: int = setting(default=3072, at_least=1)
    norm_eps: float = setting(default=1e-6, at_least=0)
    logit_bias: float = -10.0


_BLOCK_RULES = (
    (r"blocks/attn/[qkv]/kernel", (None, "fsdp", "tensor")),
    (r"blocks/attn/o/kernel", (None, "tensor", "fsdp")),
    (r"blocks/mlp/fc1/kernel", (None, "fsdp", "tensor")),
    (r"blocks/mlp/fc2/kernel", (None, "tensor", "fsdp")),
    (r".*(scale[12]?|bias|pos_embed|class_embed|probe)", ()),
)
TOWER_RULES = (
    (r"patch_embed/kernel", (None, None, None, "fsdp")),
    (r"head/(attn/[qkv]|mlp/fc1)/kernel", ("fsdp", "tensor")),
    (r"head/(attn/o|mlp/fc2)/kernel", ("tensor", "fsdp")),
    *_BLOCK_RULES,
)
TEXT_TOWER_RULES = ((r"(embed/embedding|head/kernel)", (None, "fsdp")), *_BLOCK_RULES)

_SMOOTH_NORM = 4.0  # norm of the smooth part of an initial filter; its white part has norm 1
# Std of an initial position table: half the size of a patch's embedding. With std 0.07 positions barely
# affect the pooled mean early on: 13 classes of slices had a held-out loss of 2.6 after 100 steps, here 2.0.
_POSITION_STD = 3.0
# Gain of initial text embeddings, in units of width**-0.5: words count for more than positions.
_WORD_GAIN = 5.0


class PatchEmbed(nnx.Module):
    """Convolution whose stride is its kernel, VALID padding: border pixels that fill no patch are dropped.

    Parameters: kernel HWIO [p, p, 3, D], bias [D].
    """

    def __init__(self, patch_size: int, width: int, **init: Unpack[Init]):
        self.patch_size = patch_size
        self.dtype = jnp.dtype(init["dtype"])
        kernel = _first_filters(init["rngs"].params(), patch_size, width, init["param_dtype"])
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(jnp.zeros((width,), init["param_dtype"]))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [N, S, S, 3] -> [N, (S // p)**2, D], patches row by row."""
        p = self.patch_size
        n, height, width, channels = images.shape
        rows, columns = height // p, width // p
        x = images[:, : rows * p, : columns * p].reshape(n, rows, p, columns, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, p * p * channels)
        kernel = self.kernel[...].astype(self.dtype)
        x = einsum("npi,io->npo", x.astype(self.dtype), kernel.reshape(-1, kernel.shape[-1]))
        return x + self.bias[...].astype(self.dtype)


def _first_filters(key: jax.Array, patch_size: int, width: int, dtype: Any) -> jax.Array:
    """Initial patch filters [p, p, 3, D]: zero-mean, grey, low-frequency patterns plus white noise.

    Images have most energy in low frequencies, and medical images a black background, so white noise alone
    responds mostly to the mean of a patch: a tower of 6 blocks reached a loss of 3.0, with these filters 1.9
    (38 classes of slices, 80 steps). The noise gives the kernel full rank.
    """
    smooth_key, white_key = jax.random.split(key)
    coarse = min(4, patch_size)
    shape = (patch_size, patch_size, 3, width)
    smooth = jax.random.normal(smooth_key, (coarse, coarse, 1, width), jnp.float32)
    smooth = jax.image.resize(smooth, (*shape[:2], 1, width), "linear")
    smooth = smooth - smooth.mean(axis=(0, 1, 2))
    smooth = _SMOOTH_NORM * smooth / jnp.sqrt(3 * jnp.square(smooth).sum(axis=(0, 1, 2)))
    white = jax.random.normal(white_key, shape, jnp.float32) / (3 * patch_size**2) ** 0.5
    return (smooth + white).astype(dtype)


def check_images(images: jax.Array, size: int) -> None:
    """Raises ValueError if `images` are not uint8 [N, size, size, 3]."""
    if images.dtype != jnp.uint8 or images.shape[1:] != (size, size, 3):
        raise ValueError(f"images must be uint8 [N, {size}, {size}, 3], not {images.dtype} {images.shape}")


class AttentionPool(nnx.Module):
    """Multi-head attention pooling: a learned probe attends to all tokens, then a residual MLP."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, eps: float, **init: Unpack[Init]):
        self.probe = normal_table((1, 1, width), width**-0.5, **init)
        self.attn = SelfAttention(width, num_heads, **init)
        self.norm = LayerNorm(width, eps=eps, **init)
        self.mlp = GeluMLP(width, mlp_dim, **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, T, D] -> [N, D]."""
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        # Explicit shardings between two products, see `projector`.
        x = shard(self.attn(x, query=shard(probe, "batch", None, "embed")), "batch", None, "embed")
        return shard(x + self.mlp(self.norm(x)), "batch", None, "embed")[:, 0]


def normal_table(shape: tuple[int, ...], stddev: float, **init: Unpack[Init]) -> nnx.Param[jax.Array]:
    """A normally distributed parameter, such as a table of positions."""
    return nnx.Param(jax.random.normal(init["rngs"].params(), shape, init["param_dtype"]) * stddev)


class VisionTower(nnx.Module):
    """Base of image towers: patches; a subclass adds the blocks and defines `pixel_features`."""

    def __init__(self, cfg: TowerConfig, *, remat: str, **init: Unpack[Init]):
        self.image_size = cfg.image_size
        self.grid = cfg.image_size // cfg.patch_size
        self.remat = remat
        self.num_feature_layers = cfg.feature_layers
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.hidden_size, **init)

    def features(self, images: jax.Array) -> jax.Array:
        """Patch features for the projector: uint8 [N, S, S, 3] -> [N, T, D], hidden state `select_layer`.

        They are not normalised, and later blocks are not computed.
        """
        check_images(images, self.image_size)
        return self.pixel_features(images.astype(jnp.float32))

    def pixel_features(self, pixels: jax.Array) -> jax.Array:
        """`features` of interpolated pixels: float32 [N, S, S, 3] from 0 to 255."""
        raise NotImplementedError


class SiglipVision(VisionTower):
    """Image tower.

    All blocks, `post_norm` and, with `cfg.head`, the pooling head exist in every stage, so that stage 1 and
    later stages share parameters.
    """

    def __init__(self, cfg: SiglipConfig, *, remat: str, **init: Unpack[Init]):
        super().__init__(cfg, remat=remat, **init)
        self.num_layers = cfg.num_layers
        self.pos_embed = normal_table((self.grid**2, cfg.hidden_size), _POSITION_STD, **init)
        shape = (cfg.hidden_size, cfg.num_heads, cfg.mlp_dim)
        self.blocks = EncoderBlock(*shape, eps=cfg.norm_eps, stack=(cfg.num_layers,), **init)
        self.post_norm = LayerNorm(cfg.hidden_size, eps=cfg.norm_eps, **init)
        self.head = AttentionPool(*shape, eps=cfg.norm_eps, **init) if cfg.head else None

    def _run(self, pixels: jax.Array, count: int) -> jax.Array:
        x = self.patch_embed(pixels / 127.5 - 1.0)
        x = shard(x + self.pos_embed[...].astype(x.dtype), "batch", None, "embed")
        tokens, length = x.shape[1], row_length(x.shape[1])
        if length == tokens:
            return run_stack(self.blocks, x, remat=self.remat, count=count)
        x = shard(jnp.pad(x, ((0, 0), (0, length - tokens), (0, 0))), "batch", None, "embed")
        valid = jnp.broadcast_to(jnp.arange(length) < tokens, x.shape[:2]).astype(jnp.int32)
        return run_stack(self.blocks, x, valid, remat=self.remat, count=count)[:, :tokens]

    @logical_axes.tower_rules()
    def pixel_features(self, pixels: jax.Array) -> jax.Array:
        """See `VisionTower`."""
        return self._run(pixels, self.num_feature_layers)

    @logical_axes.tower_rules()
    def pooled(self, images: jax.Array) -> jax.Array:
        """Image embedding for contrastive training: uint8 [N, S, S, 3] -> [N, D], not normalised.

        Raises:
          UserError: the tower has no head.
        """
        if self.head is None:
            raise UserError("model.vision_tower.head=False: there is nothing to pool with; set it to True")
        check_images(images, self.image_size)
        return self.head(self.post_norm(self._run(images.astype(jnp.float32), self.num_layers)))


class SiglipText(nnx.Module):
    """Text tower: bidirectional; pools the last valid token.

    The released models pad to a fixed length and attend to padding, as with `valid` all True. Tokens that are
    not valid are neither attended to nor pooled.
    """

    def __init__(self, cfg: SiglipTextConfig, out_dim: int, *, remat: str, **init: Unpack[Init]):
        self.max_length = cfg.max_length
        self.remat = remat
        width, stddev = cfg.hidden_size, cfg.hidden_size**-0.5
        self.embed = Embed(cfg.vocab_size, width, stddev=_WORD_GAIN * stddev, **init)
        self.pos_embed = normal_table((cfg.max_length, width), stddev, **init)
        shape = (width, cfg.num_heads, cfg.mlp_dim)
        self.blocks = EncoderBlock(*shape, eps=cfg.norm_eps, stack=(cfg.num_layers,), **init)
        self.final_norm = LayerNorm(width, eps=cfg.norm_eps, **init)
        self.head = Linear(width, out_dim, **init)

    @logical_axes.tower_rules()
    def __call__(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """Tokens int [B, T], valid bool [B, T] (padding on the right) -> [B, E], not normalised.

        Raises:
          ValueError: T exceeds the position table.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"text of {length} tokens, but model.text_tower.max_length is {self.max_length}")
        x = self.embed(tokens)
        x = shard(x + self.pos_embed[:length].astype(x.dtype), "batch", None, "embed")
        x = run_stack(self.blocks, x, valid.astype(jnp.int32), remat=self.remat)
        last = jnp.where(valid, jnp.arange(length), 0).max(axis=1)
        x = shard(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], "batch", "embed")
        return shard(self.head(self.final_norm(x)), "batch", "embed")


# Our fields → keys of config.json, and the sizes of the base model, transformers' defaults.
_SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
VISION_SIZES = {"image_size": "image_size", "patch_size": "patch_size", **_SIZES}
_TEXT_SIZES = {"vocab_size": "vocab_size", "max_length": "max_position_embeddings", **_SIZES}
_BASE = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}


def read_vision_config(values: Mapping[str, Any], where: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of a SigLIP vision tower, or of both towers, into a vision tower's section.

    Files on the hub omit transformers' defaults, those of the base model.

    Raises:
      UserError: an unsupported setting.
    """
    vision = hf.subsection(values, "vision_config", where) if values.get("model_type") == "siglip" else values
    hf.refuse(vision, where, {"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)})
    return {
        "type": "siglip",
        **hf.read_sizes(vision, where, VISION_SIZES, {"image_size": 224, "patch_size": 16, **_BASE}),
        "norm_eps": hf.number(vision, "layer_norm_eps", where, 1e-6),
        # transformers pools by default; PaliGemma's towers, which NVILA has, lack the head.
        "head": "head.probe" in shapes,
    }


def read_text_config(values: Mapping[str, Any], where: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the text tower of a SigLIP's config.json into a section."""
    text = hf.subsection(values, "text_config", where)
    hf.refuse(text, where, {"hidden_act": ("gelu_pytorch_tanh",)})
    sizes = hf.read_sizes(text, where, _TEXT_SIZES, {"vocab_size": 32_000, "max_length": 64, **_BASE})
    hf.layer_count(sizes["num_layers"], shapes, f"{where}: text_config.num_hidden_layers")
    # `logit_bias` initialises new models only; released weights contain their own.
    return {**sizes, "norm_eps": hf.number(text, "layer_norm_eps", where, 1e-6), "logit_bias": -10.0}


def vision_sizes(tower: TowerConfig, dtype: str) -> dict[str, Any]:
    """The sizes of a tower in config.json."""
    sizes = {**hf.write_sizes(tower, VISION_SIZES), "num_channels": 3, "layer_norm_eps": tower.norm_eps}
    return {**sizes, "dtype": dtype, "torch_dtype": dtype}


def write_vision_config(tower: SiglipConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a SigLIP vision tower; `read_vision_config` reads it back."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **vision_sizes(tower, dtype),
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "vision_use_head": tower.head,
    }


def write_pair_config(tower: SiglipConfig, text: SiglipTextConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a SigLIP with both towers."""
    vision = write_vision_config(tower, dtype)
    del vision["architectures"]
    dtypes = {"dtype": dtype, "torch_dtype": dtype}
    text_config = {
        "model_type": "siglip_text_model",
        **hf.write_sizes(text, _TEXT_SIZES),
        "layer_norm_eps": text.norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "projection_size": tower.hidden_size,
        **dtypes,
    }
    own = {"architectures": ["SiglipModel"], "model_type": "siglip"}
    return {**own, "vision_config": vision, "text_config": text_config, **dtypes}


def preprocessor(tower: SiglipConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a SigLIP: a square, scaled to -1 to 1."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": tower.image_size, "width": tower.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
    }


def vision_tensors(tower: SiglipConfig) -> list[TensorRule]:
    """Tensors of the vision tower, by their names without prefix."""
    to = "vision_tower/"
    rules = [
        *hf.dense(f"{to}patch_embed", "embeddings.patch_embedding", layout=hf.PATCHES),
        TensorRule(f"{to}pos_embed", ("embeddings.position_embedding.weight",), KEEP),
        *hf.layer_norm(f"{to}post_norm", "post_layernorm"),
        *_encoder(f"{to}blocks", "encoder.layers", tower.num_layers),
    ]
    if tower.head:
        rules += [
            TensorRule(f"{to}head/probe", ("head.probe",), KEEP),
            *_pooling_attention(f"{to}head/attn", "head.attention"),
            *hf.layer_norm(f"{to}head/norm", "head.layernorm"),
            *hf.dense(f"{to}head/mlp/fc1", "head.mlp.fc1"),
            *hf.dense(f"{to}head/mlp/fc2", "head.mlp.fc2"),
        ]
    return rules


def text_tensors(text: SiglipTextConfig) -> list[TensorRule]:
    """Tensors of a two-tower SigLIP besides its vision tower."""
    to, prefix = "text_tower/", "text_model."
    embeddings = [
        ("embed/embedding", f"{prefix}embeddings.token_embedding.weight", KEEP),
        ("pos_embed", f"{prefix}embeddings.position_embedding.weight", KEEP),
    ]
    return [
        *hf.single(to, embeddings),
        *_encoder(f"{to}blocks", f"{prefix}encoder.layers", text.num_layers),
        *hf.layer_norm(f"{to}final_norm", f"{prefix}final_layer_norm"),
        *hf.dense(f"{to}head", f"{prefix}head"),
        *hf.single("", [(name, name, hf.LEADING) for name in ("logit_scale", "logit_bias")]),
    ]


def _encoder(target: str, source: str, count: int) -> list[TensorRule]:
    """The blocks of either tower."""
    names = {
        "norm1": ("layer_norm1", "scale", KEEP),
        "norm2": ("layer_norm2", "scale", KEEP),
        **{f"attn/{name}": (f"self_attn.{name}_proj", "kernel", TRANSPOSE) for name in "qkv"},
        "attn/o": ("self_attn.out_proj", "kernel", TRANSPOSE),
        "mlp/fc1": ("mlp.fc1", "kernel", TRANSPOSE),
        "mlp/fc2": ("mlp.fc2", "kernel", TRANSPOSE),
    }
    rows: list[tuple[str, str, Layout]] = []
    for ours, (theirs, weight, layout) in names.items():
        rows += [(f"{ours}/{weight}", f"{theirs}.weight", layout), (f"{ours}/bias", f"{theirs}.bias", KEEP)]
    return hf.stacked(target, source, count, rows)


def _pooling_attention(target: str, source: str) -> list[TensorRule]:
    """PyTorch's MultiheadAttention stores query, key and value in one tensor, in this order."""
    rules = hf.dense(f"{target}/o", f"{source}.out_proj")
    for part, name in enumerate("qkv"):
        kernel, bias = Layout(axes=(1, 0), part=part, parts=3), Layout(part=part, parts=3)
        rules.append(TensorRule(f"{target}/{name}/kernel", (f"{source}.in_proj_weight",), kernel))
        rules.append(TensorRule(f"{target}/{name}/bias", (f"{source}.in_proj_bias",), bias))
    return rules


_FIRST = "embeddings.patch_embedding.weight"


def _without_prefix(names: Collection[str]) -> dict[str, str]:
    """Strips the prefix of the vision tower's tensors."""
    prefixes = [name.removesuffix(_FIRST) for name in names if name.endswith(_FIRST)]
    if len(prefixes) != 1:
        raise UserError(f"{len(prefixes)} tensors end in {_FIRST}, one was expected; is it a SigLIP?")
    return {name: name.removeprefix(prefixes[0]) for name in names}


def _unused(names: Collection[str]) -> dict[str, str]:
    outside = "text tower and its logit scale: only the vision tower is imported"
    return {
        **{name: outside for name in names if name.startswith(("text_model.", "logit_"))},
        **{name: "0, 1, 2, ...: computed" for name in names if name.endswith("position_ids")},
    }


FAMILY = families.ModelFamily(
    name="siglip",
    component="vision_tower",
    config=SiglipConfig,
    module=SiglipVision,
    parameter_rules=TOWER_RULES,
    hugging_face=families.HuggingFaceLayout(
        model_types=("siglip_vision_model", "siglip"),
        read_config=read_vision_config,
        write_config=write_vision_config,
        tensors=vision_tensors,
        unused=_unused,
        preprocessor=preprocessor,
        rename=_without_prefix,
        prefix="vision_model.",
    ),
    patches=lambda tower: (tower.image_size // tower.patch_size) ** 2,
)
