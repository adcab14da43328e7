"""Frozen kernels in quantised storage (`config.quantization.frozen`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.ops import quantized as quantized_lib
from vilam3_jax.ops.quantized import QuantizationConfig, QuantizedKernel, quantize_kernel
from vilam3_jax.sharding import logical_axes

# Linear layers gather over these axes, so a kernel may also be replicated.
_GATHERED_OVER = ("data", "fsdp", logical_axes.FSDP_LINE)


def abstract(
    quantization: QuantizationConfig, params: Mapping[str, Any], lr_multipliers: Mapping[str, float]
) -> dict[str, QuantizedKernel]:
    """The quantised kernels, as ShapeDtypeStructs with shardings.

    Args:
      quantization: section of the config.
      params: path → ShapeDtypeStruct with sharding of every parameter.
      lr_multipliers: path → learning-rate multiplier.

    Raises:
      UserError: Qwix is not installed, no module matches, or a kernel is trainable or not divisible.
    """
    kind = quantization.frozen
    if not kind:
        return {}
    quantized_lib.check_installed("quantization.frozen")
    found = {}
    for path in quantization.matching(params):
        if lr_multipliers[path]:
            raise UserError(
                f"config quantization.frozen={kind!r} includes {path}, but config trainable lets it learn "
                f"({lr_multipliers[path]:g}); freeze it there, or exclude it from quantization.modules"
            )
        if kind == "nf4" and params[path].shape[-2] % quantized_lib.NF4_TILE:
            raise UserError(
                f"config quantization.frozen='nf4': {path} has {params[path].shape[-2]} rows, not a multiple "
                f"of {quantized_lib.NF4_TILE}; exclude it from quantization.modules, or use 'int8'"
            )
        found[path] = _sharded(path, params[path], kind)
    return found


def _sharded(path: str, kernel: Any, kind: str) -> QuantizedKernel:
    """Each array is sharded like the kernel, in the dimensions that are divisible."""
    mesh = kernel.sharding.mesh

    def place(array: Any) -> jax.ShapeDtypeStruct:
        spec = []
        for size, axes in zip(array.shape, (*kernel.sharding.spec, *[None] * array.ndim), strict=False):
            names = (axes,) if isinstance(axes, str) else tuple(axes or ())
            divides = size % math.prod(mesh.shape[name] for name in names) == 0
            if not divides and size > 1 and not set(names) <= set(_GATHERED_OVER):
                raise UserError(
                    f"mesh: {path} in quantization.frozen={kind!r} has {size} tiles, which are not "
                    f"divisible over {axes}; make the axis smaller"
                )
            spec.append(axes if divides else None)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(partial(quantize_kernel, kind=kind), kernel))


def placed_like(path: str, kernel: jax.ShapeDtypeStruct, stored: QuantizedKernel) -> QuantizedKernel:
    """The abstract kernel `stored` on the devices of `kernel`, its dequantised form with a sharding.

    Raises:
      UserError: its tiles are not divisible over the mesh.
    """
    if isinstance(kernel.sharding, NamedSharding):
        return _sharded(path, kernel.update(dtype=stored.dtype), stored.kind)
    return jax.tree.map(lambda array: array.update(sharding=kernel.sharding), stored)


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
            found[path] = quantize(array, kernel)
    return found


def quantize(array: jax.Array, wanted: QuantizedKernel) -> QuantizedKernel:
    """Quantises layer by layer, to bound memory: Qwix compares every value with all 16 codes of nf4."""
    each = partial(quantize_kernel, kind=wanted.kind)
    stacked = partial(jax.lax.map, each) if array.ndim > 2 else each
    return jax.jit(stacked, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))(array)
