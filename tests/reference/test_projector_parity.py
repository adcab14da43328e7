"""Every projector type against the same layers in PyTorch, named and joined as VILA's checkpoints are."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from torch.nn import GELU, LayerNorm, Linear, Sequential

from tests.reference import torch_weights
from vilam3_jax.models.projector import Projector

C, H = 6, 10


class Join(torch.nn.Module):
    """block x block patches to one token, by hand: no reshape that could share a mistake."""

    def __init__(self, block, columns):
        super().__init__()
        self.block, self.columns = block, columns

    def forward(self, x):
        n, tokens, channels = x.shape
        grid = int(tokens**0.5)
        side = -(-grid // self.block)
        out = torch.zeros(n, side * side, self.block**2 * channels)
        for row in range(grid):
            for column in range(grid):
                (r, in_row), (c, in_column) = divmod(row, self.block), divmod(column, self.block)
                token = c * side + r if self.columns else r * side + c
                at = (in_row * self.block + in_column) * channels
                out[:, token, at : at + channels] = x[:, row * grid + column]
        return out


def layers(kind):
    """The modules in the order that gives the released tensors their numbers."""
    if kind == "linear":
        return [Linear(C, H)]
    if kind == "mlp3x_gelu":
        return [Linear(C, H), GELU(), Linear(H, H), GELU(), Linear(H, H)]
    joined = [Join(3 if "3x3" in kind else 2, columns=kind == "mlp_downsample")]
    if kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        return [*joined, LayerNorm(4 * C), Linear(4 * C, H), GELU(), Linear(H, H)]
    hidden = {"3x3_fix": (9, 3), "3x3_s2": (9, 3, 1, 1 / 3), "3x3_s2_new": (9, 4, 2, 1, 1 / 3)}
    widths = [round(C * share) for share in hidden[kind.removeprefix("mlp_downsample_")]] + [H]
    stack = joined
    for before, after in itertools.pairwise(widths):
        stack += [LayerNorm(before), Linear(before, after), GELU()]
    return [*stack, Linear(H, H)]


@pytest.mark.parametrize(
    "kind",
    [
        "linear",
        "mlp3x_gelu",
        "mlp_downsample",
        "mlp_downsample_2x2_fix",
        "mlp_downsample_3x3_fix",
        "mlp_downsample_3x3_s2",
        "mlp_downsample_3x3_s2_new",
    ],
)
@pytest.mark.parametrize("grid", [4, 5, 6])
def test_projector(kind, grid):
    modules = layers(kind)
    reference = torch_weights.randomise(Sequential(*modules))
    order = "column" if kind == "mlp_downsample" else "row"
    cfg = ConfigDict(dict(type=kind, token_order=order))
    ours = Projector(cfg, C, H, rngs=nnx.Rngs(0), dtype="float32", param_dtype="float32")
    state = torch_weights.numpy_state(reference)
    norms = [i for i, m in enumerate(modules) if isinstance(m, LayerNorm)]
    dense = [i for i, m in enumerate(modules) if isinstance(m, Linear)]
    assert (ours.plan.norms, ours.plan.depth) == (len(norms), len(dense))
    for number, i in enumerate(norms, 1):
        part = torch_weights.norm(state, str(i))
        norm = getattr(ours, f"norm{number}")
        norm.scale[...], norm.bias[...] = part["scale"], part["bias"]
    for number, i in enumerate(dense, 1):
        part = torch_weights.linear(state, str(i))
        layer = getattr(ours, f"fc{number}")
        layer.kernel[...], layer.bias[...] = part["kernel"], part["bias"]
    x = np.random.default_rng(grid).normal(size=(2, grid**2, C)).astype(np.float32)
    with torch.no_grad():
        want = reference(torch.from_numpy(x)).numpy()
    got = np.asarray(ours(jnp.asarray(x)))
    assert got.shape == (2, ours.num_tokens(grid), H) and np.ptp(want) > 0.5
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
