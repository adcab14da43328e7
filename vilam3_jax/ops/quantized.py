"""Products of quantised factors, by Qwix (an optional package): int8 or float8 in, float32 out.

Factors get dynamic scales, the largest magnitude over the contracted axes, one for each channel that is left:
a row of activations, a column of a kernel. Under `shard_map` that is the part of the contraction that the
device holds, so nothing is exchanged for scales: a kernel whose rows are split over `tensor` has one scale a
column and device, as with Qwix's `tile_size`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from vilam3_jax.errors import UserError
from vilam3_jax.ops import products

# Name → types of a product's factors, and of an incoming gradient.
_TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


@dataclasses.dataclass(frozen=True)
class QuantizedProducts:
    """How a module's products are computed.

    Attributes:
      kind: 'int8', or 'fp8' (e4m3; gradients e5m2).
      gradients: whether the two products of the backward pass are quantised, too. Else they take the factors
        as they came: the gradient goes straight through the rounding.
    """

    kind: str
    gradients: bool = False


def check_installed(key: str) -> None:
    """Looks for Qwix.

    Args:
      key: the config key that asks for it.

    Raises:
      UserError: it is not installed.
    """
    if importlib.util.find_spec("qwix") is None:
        raise UserError(
            f"config {key} needs the package qwix, which is not installed; pip install 'vilam3-jax[quant]', "
            "or leave the key empty"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def einsum(how: QuantizedProducts, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays, both quantised first.

    Args:
      how: types of the factors.
      spec: 'abi,io->abo' and the like: one letter an axis, each in two of the three terms, and those of the
        result in the order of the factors.
      x: first factor.
      y: second factor.

    Returns:
      The product in the type of `x`; scaled in float32.
    """
    import qwix

    factors, result = spec.split("->")
    quantized = [
        _quantize(array, letters, result, _TYPES[how.kind][0])
        for array, letters in zip((x, y), factors.split(","), strict=True)
    ]
    return qwix.einsum(spec, *quantized).astype(x.dtype)


def _quantize(array: jax.Array, letters: str, kept: str, kind: Any) -> Any:
    """A `qwix.QArray` with a float32 scale for every index of the axes that are in `kept`."""
    import qwix

    channels = [axis for axis, letter in enumerate(letters) if letter in kept]
    return qwix.quantize(array.astype(jnp.float32), kind, channelwise_axes=channels)


def _forward(how: QuantizedProducts, spec: str, x: Any, y: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    # Kept as they came, and quantised again where it is asked for: a quantised kernel would be one more array
    # for every layer.
    kept = x.value if y.perturbed else None, y.value if x.perturbed else None
    return einsum(how, spec, x.value, y.value), kept


def _backward(how: QuantizedProducts, spec: str, kept: tuple[Any, Any], gradient: Any) -> tuple[Any, Any]:
    if isinstance(gradient, SymbolicZero):
        return None, None
    factors, result = spec.split("->")
    first, second = factors.split(",")
    x, y = kept

    def product(other: jax.Array, letters: str, wanted: str) -> jax.Array:
        if not how.gradients:
            return products.einsum(f"{result},{letters}->{wanted}", gradient, other)
        return _gradient_product(how, gradient, result, other, letters, wanted)

    return (
        None if y is None else product(y, second, first),
        None if x is None else product(x, first, second),
    )


einsum.defvjp(_forward, _backward, symbolic_zeros=True)


def _gradient_product(
    how: QuantizedProducts, gradient: jax.Array, result: str, factor: jax.Array, letters: str, wanted: str
) -> jax.Array:
    """The product of an incoming gradient with a factor as the forward pass quantised it.

    The factor's scales lie along axes that are contracted here: they go into the gradient before that is
    quantised, with scales of its own along the axes that are left.
    """
    import qwix

    forward, backward = _TYPES[how.kind]
    quantized = _quantize(factor, letters, result, forward)
    along = [quantized.scale.shape[letters.index(axis)] if axis in letters else 1 for axis in result]
    scaled = gradient.astype(jnp.float32) * quantized.scale.reshape(along)
    spec = f"{result},{letters}->{wanted}"
    out = qwix.einsum(spec, _quantize(scaled, result, wanted, backward), quantized.qvalue)
    return out.astype(factor.dtype)
