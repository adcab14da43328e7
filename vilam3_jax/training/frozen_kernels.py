"""Frozen kernels that are stored quantised (`config.quantization.frozen`): which, where, and from what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.config import ConfigDict
from vilam3_jax.errors import UserError
from vilam3_jax.models import layers, param_paths, vila
from vilam3_jax.ops.quantized import NF4_TILE, QuantizedKernel, check_installed, quantize_kernel
from vilam3_jax.sharding import logical_axes

_GATHERED_OVER = ("data", "fsdp", logical_axes.FSDP_LINE)  # by products, so an array may as well be whole


def abstract(
    config: ConfigDict, graphdef: Any, params: Mapping[str, Any], rates: Mapping[str, float]
) -> dict[str, QuantizedKernel]:
    """The kernels that this config stores quantised, as ShapeDtypeStructs with shardings.

    Args:
      config: the run's config.
      graphdef: structure of its model.
      params: path → ShapeDtypeStruct of every parameter, with its sharding.
      rates: path → learning-rate multiplier.

    Raises:
      UserError: Qwix is not installed, no module matches, a kernel learns, or it does not divide.
    """
    kind, modules = config.quantization.frozen, config.quantization.modules
    if not kind:
        return {}
    check_installed("quantization.frozen")
    model = vila.merge(graphdef, param_paths.unflatten(dict(params)))
    found = {}
    for module in layers.matching(model, modules):
        path = f"{module}/kernel"
        if rates[path]:
            raise UserError(
                f"config quantization.frozen={kind!r} wants {path}, but config trainable lets it learn "
                f"({rates[path]:g}); freeze it there, or leave it out of quantization.modules"
            )
        if kind == "nf4" and params[path].shape[-2] % NF4_TILE:
            raise UserError(
                f"config quantization.frozen='nf4': {path} has {params[path].shape[-2]} rows, no multiple of "
                f"{NF4_TILE}; leave it out of quantization.modules, or take 'int8'"
            )
        found[path] = _placed(path, params[path], kind)
    return found


def _placed(path: str, kernel: Any, kind: str) -> QuantizedKernel:
    """Each array split as the kernel would be, in the dimensions that divide."""
    mesh = kernel.sharding.mesh

    def place(array: Any) -> jax.ShapeDtypeStruct:
        spec = []
        for size, axes in zip(array.shape, (*kernel.sharding.spec, *[None] * array.ndim), strict=False):
            names = (axes,) if isinstance(axes, str) else tuple(axes or ())
            divides = size % math.prod(mesh.shape[name] for name in names) == 0
            if not divides and size > 1 and not set(names) <= set(_GATHERED_OVER):
                raise UserError(
                    f"mesh: {path} in quantization.frozen={kind!r} has {size} tiles, which do not split over "
                    f"{axes}; make the axis smaller"
                )
            spec.append(axes if divides else None)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(partial(quantize_kernel, kind=kind), kernel))


def load(
    wanted: Mapping[str, QuantizedKernel],
    read: Callable[[dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]],
) -> dict[str, QuantizedKernel]:
    """Quantises kernels as they are read: one is held in full at a time, on its devices.

    Args:
      wanted: path → ShapeDtypeStructs, from `abstract`.
      read: path → ShapeDtypeStruct with sharding ↦ path → array, of those that there are.
    """
    found: dict[str, QuantizedKernel] = {}
    for path, kernel in wanted.items():
        whole = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=kernel.qvalue.sharding)
        for array in read({path: whole}).values():
            found[path] = quantize(array, kernel)
    return found


def quantize(array: jax.Array, wanted: QuantizedKernel) -> QuantizedKernel:
    """Layer by layer: Qwix compares every number with all sixteen of nf4."""
    each = partial(quantize_kernel, kind=wanted.kind)
    stacked = partial(jax.lax.map, each) if array.ndim > 2 else each
    return jax.jit(stacked, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))(array)
