"""Every projector type against the same layers in PyTorch, with the tensor names of VILA's checkpoints."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import GELU, LayerNorm, Linear, Sequential

from tests.reference import torch_weights
from vilam3_jax.models.projector import Projector, ProjectorConfig
from vilam3_jax.runtime import compat

C, H = 6, 10
WIDE = 18  # the types for three scales normalise a third of it


class Join(torch.nn.Module):
    """Joins block x block patches into one token with loops, independently of our reshapes."""

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


def layers(kind, c=C):
    """The modules in the order of the numbers in released tensor names."""
    if kind == "linear":
        return [Linear(c, H)]
    if kind == "mlp3x_gelu":
        return [Linear(c, H), GELU(), Linear(H, H), GELU(), Linear(H, H)]
    joined = [Join(3 if "3x3" in kind else 2, columns=kind == "mlp_downsample")]
    if kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        return [*joined, LayerNorm(4 * c), Linear(4 * c, H), GELU(), Linear(H, H)]
    hidden = {"3x3_fix": (9, 3), "3x3_s2": (9, 3, 1, 1 / 3), "3x3_s2_new": (9, 4, 2, 1, 1 / 3)}
    widths = [round(c * share) for share in hidden[kind.removeprefix("mlp_downsample_")]] + [H]
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
    modules = layers(kind, WIDE)
    reference = torch_weights.randomise(Sequential(*modules))
    order = "column" if kind == "mlp_downsample" else "row"
    cfg = ProjectorConfig(type=kind, token_order=order)
    ours = Projector(cfg, WIDE, H, rngs=nnx.Rngs(0), dtype="float32", param_dtype="float32")
    norms = [m for m in modules if isinstance(m, LayerNorm)]
    dense = [m for m in modules if isinstance(m, Linear)]
    assert (ours.layers.norms, ours.layers.depth) == (len(norms), len(dense))
    graphdef, abstract = compat.split(ours)
    params = torch_weights.projector(reference)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
    x = np.random.default_rng(grid).normal(size=(2, grid**2, WIDE)).astype(np.float32)
    # Large, so that gradients are far above the tolerance.
    weights = 10 * np.random.default_rng(grid + 9).normal(size=(2, ours.layers.num_tokens(grid), H))
    weights = weights.astype(np.float32)
    given = torch.from_numpy(x).requires_grad_()
    want = reference(given)
    (want * torch.from_numpy(weights)).mean().backward()
    want = want.detach().numpy()

    @jax.jit
    def run(params, x):
        def scalar(params, x):
            out = compat.merge(graphdef, params)(x)
            return (out * weights).mean(), out

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(params, x)

    (_, got), (d_params, d_x) = run(params, jnp.asarray(x))
    assert got.shape == (2, ours.layers.num_tokens(grid), H) and np.ptp(want) > 0.3
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    np.testing.assert_allclose(d_x, given.grad.numpy(), atol=1e-4, rtol=0)
    torch_weights.gradients_as_weights(reference)
    torch_weights.check_gradients(d_params, torch_weights.projector(reference))
