"""Matrices in a sharded step: an array with its sharding and its einsum.

`annotate` wraps the matrices of a model once per step. A `Weight` is a pytree and passes through `jit`,
`scan` and `nnx.merge` like the array that it wraps, so layers need not know their path in the model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

Spec = tuple[Any, ...]
# Matrices that `matmul.linear` and `embedding_lookup.lookup` read. Convolution kernels have more dimensions.
_MATRIX = re.compile(r".*/(kernel|lora_[ab]|embedding)")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix of a model, or the stacked matrices of all layers.

    Attributes:
      value: array [..., in, out] or `quantized.QuantizedKernel`.
      specs: mesh axes of every dimension, for each array in `value`; empty if the partitioner decides.
      einsum: (spec, x, value) → their product; None for the default of the value's type.
    """

    value: Any
    specs: tuple[Spec, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    einsum: Callable[..., jax.Array] | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def T(self) -> Weight:
        """The transposed matrix."""
        return dataclasses.replace(self, value=self.value.T, specs=tuple(spec[::-1] for spec in self.specs))

    @property
    def matrix_specs(self) -> tuple[Spec, ...]:
        """Mesh axes of the two dimensions of one layer's matrix, for each array in `value`."""
        return tuple(spec[-2:] for spec in self.specs)


def as_weight(value: Any) -> Weight:
    """Wraps a plain array, whose placement is left to the partitioner."""
    return value if isinstance(value, Weight) else Weight(value)


def annotate(
    params: Mapping[str, Any],
    shardings: Mapping[str, Any],
    einsums: Mapping[str, Callable[..., jax.Array]] | None = None,
) -> dict[str, Any]:
    """Returns `params` with a `Weight` for every matrix.

    Args:
      params: path → array or `QuantizedKernel`.
      shardings: path → NamedSharding, or a tree of them with the structure of the parameter.
      einsums: path → function of its product, if not the default.
    """
    wrapped = dict(params)
    for path, value in params.items():
        if _MATRIX.fullmatch(path) and len(value.shape) <= 3:
            stored = jax.tree.leaves(shardings[path], is_leaf=lambda leaf: isinstance(leaf, NamedSharding))
            pairs = zip((x.spec for x in stored), (x.ndim for x in jax.tree.leaves(value)), strict=True)
            specs = tuple((*spec, *(None,) * (rank - len(spec))) for spec, rank in pairs)
            wrapped[path] = Weight(value, specs, (einsums or {}).get(path))
    return wrapped
