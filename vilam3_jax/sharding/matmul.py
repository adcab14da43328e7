"""Matrix products with sharded weights (FSDP), in JAX's default matmul precision.

With `jax_default_matmul_precision="bfloat16"` factors are rounded to bfloat16 and sums are float32, the
default of TPUs for float32 arrays. XLA for CPUs ignores the setting but uses bfloat16 units for bfloat16
factors (four to five times as fast with AMX), so `einsum` rounds the factors, in the backward pass too.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.weights import as_weight

GATHERED = "gathered"  # tag of gathered weights, which no remat policy should save
LANES = 128  # of a TPU's registers
SUBLANES = 8
# Fewer rows than this are smaller than any large weight.
_FEW_ROWS = 512


def einsum(spec: str, x: jax.Array, y: jax.Array, preferred_element_type: Any = None) -> jax.Array:
    """`jnp.einsum` of two arrays; rounds float32 factors first if JAX's matmul precision is bfloat16.

    Args:
      spec: such as 'ab,bc->ac', with one letter per axis, each in at least two of the three terms.
      x: first factor.
      y: second factor.
      preferred_element_type: type of the result and of the sums; by default that of the factors.
    """
    rounded = jax.config.jax_default_matmul_precision == "bfloat16"  # pyright: ignore
    if rounded and x.dtype == y.dtype == jnp.float32:
        return _rounded_einsum(spec, x, y)
    return jnp.einsum(spec, x, y, preferred_element_type=preferred_element_type)


def linear(
    x: jax.Array, weight: Any, in_features: tuple[int, ...], out_features: tuple[int, ...]
) -> jax.Array:
    """`x @ weight` in the type of `x`, over one or two trailing axes such as (heads, head dim).

    In a sharded step every device multiplies its own rows. A weight that is sharded over the axes of
    the batch (ZeRO-3, FSDP) is gathered here, once per use and in the dtype of the matmul; its gradient is
    reduce-scattered. A weight whose rows are sharded over other axes (`tensor`) requires `x` to be sharded
    the same way, and partial results are summed.

    Args:
      x: `[batch, *in_features]` or `[batch, length, *in_features]`.
      weight: matrix [in, out]: an array, a `quantized.QuantizedKernel` or a `Weight` of one.
      in_features: trailing axes of `x`, whose product is `in`.
      out_features: trailing axes of the result, whose product is `out`. TPUs write heads in the layout that
        attention reads, without a copy.

    Returns:
      `[batch, *out_features]` or `[batch, length, *out_features]`.
    """
    weight = as_weight(weight)
    leading = x.ndim - len(in_features)
    multiply = weight.einsum or getattr(weight.value, "einsum", einsum)

    def product(x: jax.Array, kernel: Any) -> jax.Array:
        lead, rows = x.shape[:leading], math.prod(x.shape[:leading])
        if rows <= _FEW_ROWS and logical_axes.platform() == "tpu":
            # Heads of a weight have another layout on a TPU. To reshape the few rows instead saves a copy of
            # the weight for every token.
            y = multiply("ai,io->ao", at_least_sublanes(x.reshape(rows, -1)), kernel)[:rows]
            y = jax.lax.optimization_barrier(y)  # else XLA reshapes the weight after all
            return y.reshape(*lead, *((-1, out_features[-1]) if len(out_features) > 1 else (-1,)))
        axes, inner, outer = "ab"[:leading], "hi"[-len(in_features) :], "jo"[-len(out_features) :]
        if len(in_features) > 1:
            kernel = kernel.reshape(*x.shape[leading:], -1)
        if len(out_features) > 1:
            kernel = kernel.reshape(*kernel.shape[:-1], -1, out_features[-1])
        return multiply(f"{axes}{inner},{inner}{outer}->{axes}{outer}", x, kernel)

    step = logical_axes.current()
    if step is None or not weight.specs or x.shape[0] % logical_axes.axis_size("batch"):
        return product(x, weight.value.astype(x.dtype))
    mesh, partition_spec = step
    batch = logical_axes.mesh_axes("batch")
    splits = [[logical_axes.split_over(axes) for axes in spec] for spec in weight.matrix_specs]
    rows, columns = (tuple(axis for axis in axes if axis not in batch) or None for axes in splits[0])
    if len(in_features) > 1 and in_features[0] % logical_axes.devices_along(rows or ()):
        size = math.prod(in_features)
        return linear(x.reshape(*x.shape[:leading], size), weight, (size,), out_features)
    if len(out_features) > 1 and out_features[0] % logical_axes.devices_along(columns or ()):
        flat = linear(x, weight, in_features, (math.prod(out_features),))
        return flat.reshape(*flat.shape[:leading], *out_features)

    def gathered(array: jax.Array, split: list[tuple[str, ...]]) -> jax.Array:
        for dimension, axes in enumerate(split):
            shared = [axis for axis in axes if axis in batch]
            # The last name of a dimension is the innermost.
            for axis in reversed(shared):
                array = jax.lax.all_gather(array, axis, axis=dimension, tiled=True)
            if shared and array.ndim == 2 and logical_axes.platform() == "tpu":
                array = _thin_slices(array, dimension, array.shape[dimension] // mesh.shape[shared[0]])
        return checkpoint_name(array, GATHERED)

    def local(x: jax.Array, kernel: Any) -> jax.Array:
        arrays, structure = jax.tree.flatten(kernel.astype(x.dtype))
        # Before the gathers, so that the backward pass scatters gradients first and sums only the remaining
        # shard over other axes.
        x, *arrays = compat.equally_varying(x, *arrays)
        kernel = jax.tree.unflatten(structure, map(gathered, arrays, splits))
        y = product(x, kernel)
        return jax.lax.psum(y, rows) if rows else y

    lead = partition_spec(*("batch", "length")[:leading])
    specs = [PartitionSpec(*(axes or None for axes in split)) for split in splits]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            PartitionSpec(*lead, rows, *(None,) * (len(in_features) - 1)),
            jax.tree.unflatten(jax.tree.structure(weight.value), specs),
        ),
        out_specs=PartitionSpec(*lead, columns, *(None,) * (len(out_features) - 1)),
    )(x, weight.value)


def at_least_sublanes(x: jax.Array) -> jax.Array:
    """Pads fewer than 8 rows [n, D] with zeros on a TPU.

    XLA multiplies a single row in the vector unit instead of the matrix unit, at a third of the memory
    bandwidth.
    """
    missing = SUBLANES - x.shape[0] if logical_axes.platform() == "tpu" else 0
    return jnp.pad(x, ((0, missing), (0, 0))) if missing > 0 else x


def _thin_slices(array: jax.Array, dimension: int, width: int) -> jax.Array:
    """`array`, with a gradient that a TPU can scatter in slices of `width` along `dimension`.

    XLA falls back to an all-reduce (twice the bytes) if the shards of the minor dimension are narrower than
    128 lanes, as they would be for kernels with a head dimension.
    """
    return _other_dimension_last(array, dimension) if width < LANES else array


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _other_dimension_last(array: jax.Array, dimension: int) -> jax.Array:
    return array


_other_dimension_last.defvjp(
    lambda array, dimension: (array, None),
    lambda dimension, _, gradient: (
        with_layout_constraint(gradient, Layout(major_to_minor=(dimension, 1 - dimension))),
    ),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _rounded_forward(spec: str, x: Any, y: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    # Save unrounded operands: a rounded frozen kernel would be an extra copy per scanned layer.
    kept = x.value if y.perturbed else None, y.value if x.perturbed else None
    return _rounded_einsum(spec, x.value, y.value), kept


def _rounded_backward(spec: str, kept: tuple[Any, Any], gradient: Any) -> tuple[Any, Any]:
    if isinstance(gradient, SymbolicZero):
        return None, None
    factors, result = spec.split("->")
    first, second = factors.split(",")
    x, y = kept
    return (
        None if y is None else _rounded_einsum(f"{result},{second}->{first}", gradient, y),
        None if x is None else _rounded_einsum(f"{first},{result}->{second}", x, gradient),
    )


_rounded_einsum.defvjp(_rounded_forward, _rounded_backward, symbolic_zeros=True)
