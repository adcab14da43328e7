"""From vision features to the language model's width (layouts of VILA's `mm_projector`)."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models.layers import LayerNorm, Linear
from vilam3_jax.ops.partition import shard

_NORM_EPS = 1e-5  # PyTorch's default, with which the released projectors were trained
# Visual tokens should start at the size of text embeddings (rms 0.02 to 0.15 in trained language models); the
# usual initialisation gives 0.7, and the first steps go into shrinking it.
_SMALL_INIT = jax.nn.initializers.variance_scaling(0.04, "fan_in", "truncated_normal")


class Projector(nnx.Module):
    """[N, grid**2, C] -> [N, T, D].

    `type`: 'identity'; 'linear'; 'mlpNx_gelu' (N layers, exact GELU between them); 'mlp_downsample' (2x2
    neighbours joined into one token, LayerNorm, two layers). An odd grid gets a zero row at the bottom,
    then a zero column at the right. `token_order` says how the downsampled grid is read: 'column'
    (VILA-1.5 and VILA-M3) or 'row' (NVILA).
    """

    def __init__(self, cfg: Any, in_dim: int, out_dim: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        self.downsample = cfg.type == "mlp_downsample"
        self.column_order = cfg.token_order == "column"
        if cfg.token_order not in ("column", "row"):
            raise UserError(
                f"model.projector.token_order={cfg.token_order!r} is unknown; use 'column' or 'row'"
            )
        mlp = re.fullmatch(r"mlp([1-9]\d*)x_gelu", cfg.type)
        if self.downsample:
            in_dim, self.depth = 4 * in_dim, 2
        elif mlp:
            self.depth = int(mlp[1])
        elif cfg.type in ("linear", "identity"):
            self.depth = int(cfg.type == "linear")
        else:
            raise UserError(
                f"model.projector.type={cfg.type!r} is unknown; "
                "use mlp_downsample, mlp2x_gelu (any number of layers), linear or identity"
            )
        if not self.depth and in_dim != out_dim:
            raise UserError(
                f"an identity projector needs equal widths, but the tower has {in_dim} and the LLM {out_dim}"
            )
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.norm = LayerNorm(in_dim, eps=_NORM_EPS, **kwargs) if self.downsample else None
        for i in range(self.depth):
            init = _SMALL_INIT if i == self.depth - 1 else jax.nn.initializers.lecun_normal()
            layer = Linear(out_dim if i else in_dim, out_dim, rngs=rngs, kernel_init=init, **kwargs)
            setattr(self, f"fc{i + 1}", layer)

    def num_tokens(self, grid: int) -> int:
        """Tokens per image for a tower of grid x grid patches."""
        return grid_tokens(grid, self.downsample)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.norm is not None:
            x = self.norm(join_neighbours(x, column_order=self.column_order))
        # Every product's placement is stated: left to itself, the partitioner got the gradient between the
        # two layers wrong on a mesh of three axes (data x fsdp x tensor; jax 0.10.2).
        x = shard(x, "batch", None, None)
        for i in range(self.depth):
            x = getattr(self, f"fc{i + 1}")(jax.nn.gelu(x, approximate=False) if i else x)
            x = shard(x, "batch", None, "mlp" if i < self.depth - 1 else "embed")
        return x


def grid_tokens(grid: int, downsample: bool) -> int:
    """Tokens left of a grid x grid map; an odd grid is padded before 2x2 patches are joined."""
    return ((grid + 1) // 2) ** 2 if downsample else grid**2


def join_neighbours(x: jax.Array, *, column_order: bool) -> jax.Array:
    """Joins 2x2 patches into one token.

    Args:
      x: [N, g*g, C], row by row.
      column_order: whether tokens run down the columns of the new grid first.

    Returns:
      [N, ceil(g/2)**2, 4C]; channels of the top left, top right, bottom left, bottom right patch.

    Raises:
      ValueError: the patches form no square.
    """
    n, tokens, channels = x.shape
    grid = round(tokens**0.5)
    if grid**2 != tokens:
        raise ValueError(f"{tokens} patches form no square grid")
    x = x.reshape(n, grid, grid, channels)
    odd = grid % 2
    x = jnp.pad(x, ((0, 0), (0, odd), (0, odd), (0, 0)))
    half = (grid + odd) // 2
    x = x.reshape(n, half, 2, half, 2, channels)  # [N, row, in row, column, in column, C]
    order = (0, 3, 1, 2, 4, 5) if column_order else (0, 1, 3, 2, 4, 5)
    return x.transpose(order).reshape(n, half * half, 4 * channels)
