"""Products of quantised factors, and kernels stored quantised, by Qwix (an optional package).

`einsum` rounds both factors of a product to int8 or float8, with dynamic scales: the largest magnitude over
the contracted axes, one for each channel that is left, a row of activations or a column of a kernel. Under
`shard_map` that is the part of the contraction that the device holds, so nothing is exchanged for scales: a
kernel whose rows are split over `tensor` has one scale a column and device, as with Qwix's `tile_size`.

`QuantizedKernel` is a frozen kernel in int8 or in the 4-bit NormalFloat of QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from vilam3_jax.errors import UserError
from vilam3_jax.sharding import matmul

# Name → types of a product's factors, and of an incoming gradient.
NF4_TILE = 64  # rows of a kernel with one scale, as in QLoRA
_TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


@dataclasses.dataclass(frozen=True)
class QuantizedMatmul:
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
            f"config {key} needs the package qwix, which is not installed; pip install -e '.[quant]', "
            "or leave the key empty"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def einsum(how: QuantizedMatmul, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
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


def _forward(how: QuantizedMatmul, spec: str, x: Any, y: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    # Kept as they came, and quantised again where it is asked for: a quantised kernel would be one more array
    # for every layer.
    kept = x.value if y.perturbed else None, y.value if x.perturbed else None
    return einsum(how, spec, x.value, y.value), kept


def _backward(how: QuantizedMatmul, spec: str, kept: tuple[Any, Any], gradient: Any) -> tuple[Any, Any]:
    if isinstance(gradient, SymbolicZero):
        return None, None
    factors, result = spec.split("->")
    first, second = factors.split(",")
    x, y = kept

    def product(other: jax.Array, letters: str, wanted: str) -> jax.Array:
        if not how.gradients:
            return matmul.einsum(f"{result},{letters}->{wanted}", gradient, other)
        return _gradient_product(how, gradient, result, other, letters, wanted)

    return (
        None if y is None else product(y, second, first),
        None if x is None else product(x, first, second),
    )


einsum.defvjp(_forward, _backward, symbolic_zeros=True)


def _gradient_product(
    how: QuantizedMatmul, gradient: jax.Array, result: str, factor: jax.Array, letters: str, wanted: str
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A frozen kernel [..., in, out] as it is stored; in a model it stands where an array would.

    Attributes:
      qvalue: int8 [..., in, out]; or, for 'nf4', uint8 [..., in / 2, out]: codes of rows 2i and 2i + 1, the
        second in the upper half of a byte.
      scale: float32 [..., 1, out]; for 'nf4' [..., in / NF4_TILE, out].
      kind: 'int8' or 'nf4'.
      dtype: of the array that it stands for.
      last: the last axes of that array, if not (in, out).
    """

    qvalue: Any
    scale: Any
    kind: str = dataclasses.field(metadata=dict(static=True))
    dtype: Any = dataclasses.field(metadata=dict(static=True))
    last: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        *lead, rows, columns = self.qvalue.shape
        return (*lead, *(self.last or (rows * (2 if self.kind == "nf4" else 1), columns)))

    def astype(self, dtype: Any) -> QuantizedKernel:
        """Stands for an array of another type."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def reshape(self, *shape: int) -> QuantizedKernel:
        """A kernel [in, out] whose rows or columns are cut into heads; one size may be -1."""
        known = -math.prod(shape)
        return dataclasses.replace(
            self, last=tuple(math.prod(self.shape) // known if size == -1 else size for size in shape)
        )

    def __getitem__(self, layers: Any) -> QuantizedKernel:
        """Some of a stack's layers; [...] is all of it."""
        return self if layers is ... else jax.tree.map(lambda part: part[layers], self)

    def dequantize(self) -> jax.Array:
        """The array that it stands for, as `qwix.dequantize` makes it, in float32."""
        values = self.qvalue.astype(jnp.float32)
        if self.kind == "nf4":
            codes = jnp.stack([self.qvalue & 15, self.qvalue >> 4], axis=-2)
            values = _nf4_values(codes).reshape(*self.qvalue.shape[:-2], -1, self.qvalue.shape[-1])
        tiles = self.scale.shape[-2]
        tiled = values.reshape(*values.shape[:-2], tiles, -1, values.shape[-1]) * self.scale[..., :, None, :]
        return tiled.reshape(self.shape).astype(self.dtype)


def quantize_kernel(kernel: jax.Array, kind: str) -> QuantizedKernel:
    """Quantises kernels [..., in, out]: a scale for every column ('int8'), or every tile of it ('nf4')."""
    import qwix

    rows = kernel.ndim - 2
    channels = [axis for axis in range(kernel.ndim) if axis != rows]
    tiles = {rows: NF4_TILE} if kind == "nf4" else {}
    found = qwix.quantize(
        kernel.astype(jnp.float32),
        "nf4" if kind == "nf4" else jnp.int8,
        channelwise_axes=channels,
        tiled_axes=tiles,
    )
    qvalue = found.qvalue
    if kind == "nf4":
        codes = qvalue.astype(jnp.uint8).reshape(*kernel.shape[:-2], -1, 2, kernel.shape[-1])
        qvalue = codes[..., 0, :] | codes[..., 1, :] << 4
    return QuantizedKernel(qvalue, found.scale, kind, kernel.dtype)


def _nf4_values(codes: jax.Array) -> jax.Array:
    """Qwix's values of 4-bit codes, picked bit by bit: a TPU has no fast look-up of single numbers."""
    import qwix

    with jax.ensure_compile_time_eval():
        every = qwix.QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(1), qtype="nf4")
        values = [jnp.float32(value) for value in qwix.dequantize(every).tolist()]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, *pair[::-1]) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen_einsum(spec: str, x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    """`matmul.einsum` with a kernel that is stored quantised; only `x` has a gradient.

    The backward pass dequantises again: no layer's kernel is kept as an array.
    """
    return matmul.einsum(spec, x, kernel.dequantize())


def _frozen_forward(spec: str, x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    return frozen_einsum(spec, x, kernel), kernel


def _frozen_backward(spec: str, kernel: QuantizedKernel, gradient: jax.Array) -> tuple[jax.Array, None]:
    factors, result = spec.split("->")
    first, second = factors.split(",")
    return matmul.einsum(f"{result},{second}->{first}", gradient, kernel.dequantize()), None


frozen_einsum.defvjp(_frozen_forward, _frozen_backward)
