"""Matrix products with weights as a sharded step stores them, in the precision that JAX is set to.

With `jax_default_matmul_precision="bfloat16"` factors are rounded to bfloat16 and sums are float32: what
a TPU does with float32 arrays by default. XLA for CPUs accepts the setting and computes in float32 all the
same, but uses a processor's bfloat16 units where it is given bfloat16 factors (with AMX four to five times as
fast). Here the factors are rounded by ourselves, those of the gradients' products too.
"""

from __future__ import annotations

from collections.abc import Callable
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

GATHERED = "gathered"  # tag of weights that are put together for a product; no policy should keep them
_ROUNDED = "bfloat16"
_TYPE = jnp.bfloat16
LANES = 128  # of a TPU's registers


def einsum(spec: str, x: jax.Array, y: jax.Array, preferred_element_type: Any = None) -> jax.Array:
    """`jnp.einsum` of two arrays; float32 factors are rounded first if JAX's matmul precision says so.

    Args:
      spec: 'ab,bc->ac' and the like: one letter an axis, each in at least two of the three terms.
      x: first factor.
      y: second factor.
      preferred_element_type: type of the result and of the sums; by default that of the factors.
    """
    if x.dtype == y.dtype == jnp.float32 and jax.config.jax_default_matmul_precision == _ROUNDED:  # pyright: ignore
        return _rounded_einsum(spec, x, y)
    return jnp.einsum(spec, x, y, preferred_element_type=preferred_element_type)


def linear(
    x: jax.Array,
    kernel: Any,
    stored: tuple[Any, ...] | None,
    lead: tuple[str | None, ...],
    head_dim: int | None = None,
    times: Callable[[str, jax.Array, Any], jax.Array] = einsum,
) -> jax.Array:
    """`x @ kernel` in the type of `x`.

    In a sharded step every device multiplies its own rows. The weight is stored split over the axes that
    carry the batch, too (ZeRO-3, FSDP): here it is put together, in the type of the product and once per use.
    Its gradient goes the same way back, summed over the batch and split at once (reduce-scatter). A weight
    whose rows stay split (over `tensor`) takes an `x` split alike, and the products are summed.

    Args:
      x: [batch, ..., in], or [batch, ..., heads, hd] with heads * hd = in.
      kernel: [in, out], an array or a `quantized.QuantizedKernel`.
      stored: mesh axes of the kernel's two dimensions, or those of each of its arrays; None leaves the
        placement to the partitioner.
      lead: logical axes of [batch, ...].
      head_dim: cut the result into heads; a TPU then writes them as attention reads them, without a copy.
      times: (spec, x, kernel) → their product, for the part that a device holds.

    Returns:
      [batch, ..., out], or [batch, ..., out / head_dim, head_dim].
    """
    placed = logical_axes.placement()
    if placed is None or stored is None or x.shape[0] % logical_axes.ways("batch"):
        return _product(x, kernel.astype(x.dtype), len(lead), head_dim, times)
    mesh, spec = placed
    batch = logical_axes.mesh_axes("batch")
    parts = (stored,) if isinstance(kernel, jax.Array) else stored
    splits = [[logical_axes.split_over(names) for names in part] for part in parts]
    rows, columns = (tuple(axis for axis in names if axis not in batch) or None for names in splits[0])
    in_heads, out_heads = x.ndim > len(lead) + 1, head_dim is not None
    if in_heads and x.shape[-2] % logical_axes.size(rows or ()):
        return linear(x.reshape(*x.shape[:-2], -1), kernel, stored, lead, head_dim, times)
    if head_dim is not None and kernel.shape[1] // head_dim % logical_axes.size(columns or ()):
        return linear(x, kernel, stored, lead, times=times).reshape(*x.shape[: len(lead)], -1, head_dim)

    def gathered(array: jax.Array, split: list[tuple[str, ...]]) -> jax.Array:
        for dimension, names in enumerate(split):
            shared = [axis for axis in names if axis in batch]
            # The last name of a dimension is the innermost.
            for axis in reversed(shared):
                array = jax.lax.all_gather(array, axis, axis=dimension, tiled=True)
            if shared and array.ndim == 2 and logical_axes.platform() == "tpu":
                array = _thin_slices(array, dimension, array.shape[dimension] // mesh.shape[shared[0]])
        return checkpoint_name(array, GATHERED)

    def local(x: jax.Array, kernel: Any) -> jax.Array:
        arrays, structure = jax.tree.flatten(kernel.astype(x.dtype))
        # Before the gathers: gradients are then scattered first, and summed over other axes as the part that
        # is left.
        x, *arrays = compat.equally_varying(x, *arrays)
        kernel = jax.tree.unflatten(structure, map(gathered, arrays, splits))
        y = _product(x, kernel, len(lead), head_dim, times)
        return jax.lax.psum(y, rows) if rows else y

    rest = spec(*lead)
    specs = [PartitionSpec(*(names or None for names in split)) for split in splits]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            PartitionSpec(*rest, rows, *(None,) * in_heads),
            jax.tree.unflatten(jax.tree.structure(kernel), specs),
        ),
        out_specs=PartitionSpec(*rest, columns, *(None,) * out_heads),
    )(x, kernel)


def _thin_slices(array: jax.Array, dimension: int, width: int) -> jax.Array:
    """`array`; its gradient can be scattered in slices of `width` along `dimension`, on a TPU.

    The last dimension in memory lies in lanes of 128, and XLA does not scatter to slices of fewer: it sums
    the whole gradient for every device, twice the bytes. The gradient of a product with heads would lie so.
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


def _product(
    x: jax.Array,
    kernel: Any,
    lead: int,
    head_dim: int | None,
    times: Callable[[str, jax.Array, Any], jax.Array],
) -> jax.Array:
    axes, inner, outer = "abc"[:lead], "i", "o"
    if x.ndim > lead + 1:
        inner, kernel = "hi", kernel.reshape(*x.shape[-2:], -1)
    if head_dim is not None:
        outer, kernel = "jo", kernel.reshape(*kernel.shape[:-1], -1, head_dim)
    return times(f"{axes}{inner},{inner}{outer}->{axes}{outer}", x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x.astype(_TYPE), y.astype(_TYPE), preferred_element_type=jnp.float32)


def _rounded_forward(spec: str, x: Any, y: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    # Kept as they came: a frozen kernel of a scanned layer is then no new array, rounded it would be one.
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
