"""Frozen kernels in quantised storage (`config.quantization.frozen`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.ops import quantized as quantized_lib
from vilam3_jax.ops import quantized_loading
from vilam3_jax.ops.quantized import QuantizationConfig, QuantizedKernel


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
    quantized_lib.check_installed("config quantization.frozen", "leave the key empty")
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
        found[path] = quantized_loading.abstract(path, params[path], kind)
    return found
