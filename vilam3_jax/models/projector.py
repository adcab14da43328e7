"""From vision features to the language model's width (layouts of VILA's `mm_projector`)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models.hugging_face import KEEP, TRANSPOSE, TensorRule
from vilam3_jax.models.layers import LayerNorm, Linear
from vilam3_jax.runtime.settings import Section, setting
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard

_NORM_EPS = 1e-5  # PyTorch's default, with which the released projectors were trained
# Image tokens should start at the scale of text embeddings (rms 0.02 to 0.15 in trained language models); the
# usual initialisation gives 0.7, and the first steps only shrink it.
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
    """The layers of a projector type.

    Attributes:
      block: side of the square of patches that become one token; 1 keeps all patches.
      widths: of the input of the first layer, then of the output of each; exact GELU between layers.
      norms: how many layers, from the first, have a LayerNorm before them.
    """

    block: int
    widths: tuple[int, ...]
    norms: int

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        return len(self.widths) - 1


def layers_of(kind: str, in_dim: int, out_dim: int) -> ProjectorLayers:
    """Widths and norms of a projector type.

    Args:
      kind: one of `TYPES`, VILA's `mm_projector_type`.
      in_dim: channels of a patch, C.
      out_dim: width of the language model, H.

    Raises:
      UserError: unknown type, or widths that it cannot join.
    """
    c, h = in_dim, out_dim
    mlp = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if mlp:
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
    """[N, grid**2, C] -> [N, T, H].

    A grid that is not divisible by the block is padded with zero rows at the bottom and zero columns at the
    right.

    Parameters: norm1, fc1, norm2, ... in the order of use.
    """

    def __init__(
        self, cfg: ProjectorConfig, in_dim: int, out_dim: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any
    ):
        self.layers = layers_of(cfg.type, in_dim, out_dim)
        self.column_order = cfg.reads_columns
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        widths = self.layers.widths
        for i in range(self.layers.depth):
            if i < self.layers.norms:
                setattr(self, f"norm{i + 1}", LayerNorm(widths[i], eps=_NORM_EPS, **kwargs))
            init = _SMALL_INIT if i == self.layers.depth - 1 else jax.nn.initializers.lecun_normal()
            layer = Linear(widths[i], widths[i + 1], rngs=rngs, kernel_init=init, **kwargs)
            setattr(self, f"fc{i + 1}", layer)

    def num_tokens(self, grid: int) -> int:
        """Tokens per image for a tower of grid x grid patches."""
        return grid_tokens(grid, self.layers.block)

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


def grid_tokens(grid: int, block: int) -> int:
    """Tokens left of a grid x grid map whose block x block patches are joined, after padding."""
    return (-(-grid // block)) ** 2


def join_neighbours(x: jax.Array, block: int, *, column_order: bool) -> jax.Array:
    """Joins block x block patches into one token.

    Args:
      x: [N, g*g, C], row by row.
      block: side of a block, b; 1 changes nothing.
      column_order: whether tokens run down the columns of the new grid first.

    Returns:
      [N, ceil(g/b)**2, b*b*C]; channels of the block's patches row by row.

    Raises:
      ValueError: the patches form no square.
    """
    if block == 1:
        return x
    n, tokens, channels = x.shape
    grid = round(tokens**0.5)
    if grid**2 != tokens:
        raise ValueError(f"{tokens} patches form no square grid")
    side = -(-grid // block)
    short = side * block - grid
    x = x.reshape(n, grid, grid, channels)
    x = jnp.pad(x, ((0, 0), (0, short), (0, short), (0, 0)))
    x = x.reshape(n, side, block, side, block, channels)  # [N, row, in row, column, in column, C]
    order = (0, 3, 1, 2, 4, 5) if column_order else (0, 1, 3, 2, 4, 5)
    return x.transpose(order).reshape(n, side * side, block * block * channels)


def tensors(kind: str, layers: ProjectorLayers) -> list[TensorRule]:
    """Tensors of VILA's `mm_projector`, a torch.nn.Sequential whose indices count members without weights.

    Args:
      kind: `mm_projector_type`.
      layers: its layers.
    """
    rules = []
    place = 1 if layers.block > 1 else 0  # the first member joins patches
    for layer in range(1, layers.depth + 1):
        if layer <= layers.norms:
            rules.append(TensorRule(f"projector/norm{layer}/scale", (f"layers.{place}.weight",), KEEP))
            rules.append(TensorRule(f"projector/norm{layer}/bias", (f"layers.{place}.bias",), KEEP))
            place += 1
        stem = "layers" if kind == "linear" else f"layers.{place}"
        rules.append(TensorRule(f"projector/fc{layer}/kernel", (f"{stem}.weight",), TRANSPOSE))
        rules.append(TensorRule(f"projector/fc{layer}/bias", (f"{stem}.bias",), KEEP))
        place += 2  # GELU
    return rules
