"""From vision features to the language model's width (layouts of VILA's `mm_projector`)."""

from __future__ import annotations

import dataclasses
import re
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models.hugging_face import TensorRule, dense, layer_norm
from vilam3_jax.models.layers import Init, LayerNorm, Linear
from vilam3_jax.runtime.settings import Section, setting
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard

_NORM_EPS = 1e-5  # PyTorch's default, with which the released projectors were trained
# Image tokens start at the scale of text embeddings (rms 0.02 to 0.15 in trained language models); the usual
# initialisation gives 0.7, which the first steps would only shrink.
_SMALL_INIT = jax.nn.initializers.variance_scaling(0.04, "fan_in", "truncated_normal")
TYPES = (
    "identity",
    "linear",
    "mlp2x_gelu (1 to 99 layers)",
    "mlp_downsample",
    "mlp_downsample_2x2_fix",
    "mlp_downsample_3x3_fix",
    "mlp_downsample_3x3_s2",
    "mlp_downsample_3x3_s2_new",
)


PARAMETER_RULES = ((r"(fc\d*|linear)/kernel", ("fsdp", "tensor")), (r".*(scale|bias)", ()))


@dataclasses.dataclass(frozen=True)
class ProjectorConfig(Section):
    """The section `model.projector`.

    Attributes:
      type: one of `TYPES`, VILA's `mm_projector_type`.
      token_order: how the tokens of 'mlp_downsample' are ordered: 'column' (VILA-1.5, VILA-M3) or 'row'
        (NVILA).
    """

    key = "model.projector"
    type: str = "mlp_downsample"
    token_order: str = setting(default="column", choices=("column", "row"))

    @property
    def reads_columns(self) -> bool:
        """Whether tokens run down the columns of the grid first; all other types run row by row."""
        return self.token_order == "column" and self.type == "mlp_downsample"


@dataclasses.dataclass(frozen=True)
class ProjectorLayers:
    """The layers of a projector type, with exact GELU between them.

    Attributes:
      block: side of the square of patches that become one token; 1 keeps all patches.
      widths: width of the input, then of the output of each layer.
      norms: number of layers, counted from the first, that follow a LayerNorm.
    """

    block: int
    widths: tuple[int, ...]
    norms: int

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        return len(self.widths) - 1

    def num_tokens(self, grid: int) -> int:
        """Tokens per image for a tower of grid x grid patches, padding included."""
        return (-(-grid // self.block)) ** 2


def layers_of(kind: str, in_dim: int, out_dim: int) -> ProjectorLayers:
    """Layers of a projector type (one of `TYPES`) from patches of C channels to an LLM of width H.

    Raises:
      UserError: unknown type, or widths that it does not support.
    """
    c, h = in_dim, out_dim
    if mlp := re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind):
        return ProjectorLayers(1, (c, *(h,) * int(mlp[1])), 0)
    known = {
        "identity": ProjectorLayers(1, (c,), 0),
        "linear": ProjectorLayers(1, (c, h), 0),
        "mlp_downsample": ProjectorLayers(2, (4 * c, h, h), 1),
        "mlp_downsample_2x2_fix": ProjectorLayers(2, (4 * c, h, h), 1),
        "mlp_downsample_3x3_fix": ProjectorLayers(3, (9 * c, 3 * c, h, h), 2),
        "mlp_downsample_3x3_s2": ProjectorLayers(3, (9 * c, 3 * c, c, c // 3, h, h), 4),
        "mlp_downsample_3x3_s2_new": ProjectorLayers(3, (9 * c, 4 * c, 2 * c, c, c // 3, h, h), 5),
    }
    if kind not in known:
        raise UserError(f"model.projector.type={kind!r} is unknown; use one of {', '.join(TYPES)}")
    if kind == "identity" and c != h:
        raise UserError(
            f"an identity projector needs equal widths, but the tower has {c} and the LLM {h}; "
            "use model.projector.type=linear"
        )
    if "s2" in kind and c % 3:
        raise UserError(f"model.projector.type={kind!r} is for three scales; {c} channels do not divide by 3")
    return known[kind]


class Projector(nnx.Module):
    """[N, grid**2, C] -> [N, T, H]; parameters norm1, fc1, norm2, ... in the order of use.

    A grid that is not divisible by the block is padded with zeros at the bottom and at the right.
    """

    def __init__(self, cfg: ProjectorConfig, in_dim: int, out_dim: int, **init: Unpack[Init]):
        self.layers = layers_of(cfg.type, in_dim, out_dim)
        self.column_order = cfg.reads_columns
        widths = self.layers.widths
        for i in range(self.layers.depth):
            if i < self.layers.norms:
                setattr(self, f"norm{i + 1}", LayerNorm(widths[i], eps=_NORM_EPS, **init))
            kernel_init = _SMALL_INIT if i == self.layers.depth - 1 else jax.nn.initializers.lecun_normal()
            setattr(self, f"fc{i + 1}", Linear(widths[i], widths[i + 1], kernel_init=kernel_init, **init))

    @logical_axes.whole_sequences()
    def __call__(self, x: jax.Array) -> jax.Array:
        x = join_neighbours(x, self.layers.block, column_order=self.column_order)
        # Explicit sharding of every product: without it the partitioner computed a wrong gradient between two
        # layers on a mesh of three axes (data x fsdp x tensor; jax 0.10.2).
        x = shard(x, "batch", None, None)
        for i in range(self.layers.depth):
            if i:
                x = jax.nn.gelu(x, approximate=False)
            if i < self.layers.norms:
                x = shard(getattr(self, f"norm{i + 1}")(x), "batch", None, None)
            x = getattr(self, f"fc{i + 1}")(x)
            x = shard(x, "batch", None, "mlp" if i < self.layers.depth - 1 else "embed")
        return x


def join_neighbours(x: jax.Array, block: int, *, column_order: bool) -> jax.Array:
    """Joins block x block patches into one token: [N, g*g, C] -> [N, ceil(g/b)**2, b*b*C].

    Patches, and the channels of a block, are ordered row by row; with `column_order` tokens run down the
    columns of the new grid first. ValueError if the patches do not form a square.
    """
    if block == 1:
        return x
    n, tokens, channels = x.shape
    grid = round(tokens**0.5)
    if grid**2 != tokens:
        raise ValueError(f"{tokens} patches do not form a square grid")
    side, missing = -(-grid // block), -grid % block
    x = x.reshape(n, grid, grid, channels)
    x = jnp.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0)))
    x = x.reshape(n, side, block, side, block, channels)  # [N, row, in row, column, in column, C]
    order = (0, 3, 1, 2, 4, 5) if column_order else (0, 1, 3, 2, 4, 5)
    return x.transpose(order).reshape(n, side * side, block * block * channels)


def tensors(kind: str, layers: ProjectorLayers) -> list[TensorRule]:
    """Tensors of VILA's `mm_projector`, a torch.nn.Sequential whose indices count members without weights."""
    rules = []
    index = 1 if layers.block > 1 else 0  # the first member joins patches
    for layer in range(1, layers.depth + 1):
        if layer <= layers.norms:
            rules += layer_norm(f"projector/norm{layer}", f"layers.{index}")
            index += 1
        rules += dense(f"projector/fc{layer}", "layers" if kind == "linear" else f"layers.{index}")
        index += 2  # GELU
    return rules
