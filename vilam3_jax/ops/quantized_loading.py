"""Reading kernels into quantised storage, one at a time, onto their devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.ops.quantized import QuantizedKernel, quantize_kernel, quantize_table
from vilam3_jax.sharding import logical_axes

# Linear layers gather over these axes, so a kernel may also be replicated.
_GATHERED_OVER = ("data", "fsdp", logical_axes.FSDP_LINE)


def abstract(path: str, kernel: Any, kind: str) -> QuantizedKernel:
    """The quantised form of a kernel, or of an embedding table, as ShapeDtypeStructs with shardings.

    Args:
      path: of the parameter.
      kernel: ShapeDtypeStruct with sharding. Each array of the result is sharded like it, in the dimensions
        that are divisible.
      kind: 'int8' or 'nf4'; 'int8' for a table.

    Raises:
      UserError: tiles do not divide over a mesh axis over which the kernel must be split.
    """

    def place(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=_sharding(path, kernel.sharding, array.shape, kind)
        )

    return jax.tree.map(place, jax.eval_shape(_quantizer(path, kind), kernel))


def _sharding(path: str, sharding: Any, shape: tuple[int, ...], kind: str) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh, spec = sharding.mesh, []
    for size, axes in zip(shape, (*sharding.spec, *[None] * len(shape)), strict=False):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        if not divides and size > 1 and not set(names) <= set(_GATHERED_OVER):
            raise UserError(
                f"mesh: {path} in {kind} has {size} tiles, which are not divisible over {axes}; make the "
                "axis smaller"
            )
        spec.append(axes if divides else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def load(
    wanted: Mapping[str, QuantizedKernel],
    read: Callable[[dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]],
) -> dict[str, QuantizedKernel]:
    """Reads and quantises kernels, one at a time.

    Args:
      wanted: path → ShapeDtypeStructs, from `abstract`.
      read: (path → ShapeDtypeStruct with sharding) ↦ (path → array), of those that exist.
    """
    found: dict[str, QuantizedKernel] = {}
    for path, kernel in wanted.items():
        unquantized = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=kernel.qvalue.sharding)
        for array in read({path: unquantized}).values():
            found[path] = quantize(path, array, kernel)
    return found


def quantize(path: str, array: jax.Array, wanted: QuantizedKernel) -> QuantizedKernel:
    """Quantises layer by layer, to bound memory: Qwix compares every value with all 16 codes of nf4."""
    each = _quantizer(path, wanted.kind)
    stacked = partial(jax.lax.map, each) if array.ndim > 2 else each
    return jax.jit(stacked, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))(array)


def _quantizer(path: str, kind: str) -> Callable[[jax.Array], QuantizedKernel]:
    return quantize_table if path.endswith("/embedding") else partial(quantize_kernel, kind=kind)
