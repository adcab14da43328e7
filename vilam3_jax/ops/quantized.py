"""Quantised matrix products and quantised frozen kernels, by Qwix (an optional package).

`einsum` quantises both factors of a product to int8 or float8 with dynamic scales: the largest magnitude over
the contracted axes, one per remaining channel (a row of activations, a column of a kernel). Under `shard_map`
only the device's part of the contraction counts, so scales need no communication: a kernel whose rows are
split over `tensor` has one scale per column and device, as with Qwix's `tile_size`.

`QuantizedKernel` is a frozen kernel in int8 or in the 4-bit NormalFloat of QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import Section, setting
from vilam3_jax.sharding import matmul

MATMULS = ("int8", "fp8")
KERNELS = ("int8", "nf4")
NF4_TILE = 64  # rows of a kernel that share a scale, as in QLoRA
# Name → types of a product's factors and of an incoming gradient.
_TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


@dataclasses.dataclass(frozen=True)
class QuantizationConfig(Section):
    """The section `quantization`.

    Attributes:
      matmul: 'int8' or 'fp8' for the products of `modules`; '' for none.
      gradients: also quantise the products of the backward pass.
      frozen: storage format of the kernels of `modules`, which must be frozen: 'int8' or 'nf4'; '' for none.
      modules: regular expression of linear layers, such as 'llm/layers/.*'; never the LLM's head.
    """

    key = "quantization"
    matmul: str = setting(default="", choices=("", *MATMULS))
    gradients: bool = False
    frozen: str = setting(default="", choices=("", *KERNELS))
    modules: str = r"llm/layers/.*"

    def validate(self) -> None:
        """Checks that the settings go together."""
        if self.gradients and not self.matmul:
            raise UserError("config quantization.gradients=True needs quantization.matmul")
        if self.matmul and self.frozen:
            raise UserError(
                f"config quantization.matmul={self.matmul!r} and frozen={self.frozen!r}: a kernel that is "
                "stored quantised is multiplied dequantised; leave one of them empty"
            )
        try:
            re.compile(self.modules)
        except re.error as error:
            raise self.error("modules", f"is not a regular expression: {error}") from error

    def matching(self, shapes: Mapping[str, Any]) -> list[str]:
        """Paths of the kernels that `modules` names.

        Args:
          shapes: path → ShapeDtypeStruct of every parameter.

        Raises:
          UserError: it matches none.
        """
        linear = (path for path, leaf in shapes.items() if path.endswith("/kernel") and len(leaf.shape) <= 3)
        possible = sorted(path for path in linear if path != "llm/lm_head/kernel")
        found = [path for path in possible if re.fullmatch(self.modules, path.removesuffix("/kernel"))]
        if not found:
            known = ", ".join(path.removesuffix("/kernel") for path in possible)
            raise UserError(f"config quantization.modules={self.modules!r} matches none of {known}")
        return found


@dataclasses.dataclass(frozen=True)
class QuantizedMatmul:
    """How the product of a layer is quantised; calling it is `einsum`.

    Attributes:
      kind: 'int8', or 'fp8' (e4m3; gradients e5m2).
      gradients: also quantise the two products of the backward pass. Otherwise they use the unquantised
        factors (straight-through estimator).
    """

    kind: str
    gradients: bool = False

    def __call__(self, spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return einsum(self, spec, x, kernel)


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
    # Save unquantised operands: a quantised kernel would be an extra copy per scanned layer.
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
    """The product of an incoming gradient with a factor quantised as in the forward pass.

    The factor's scales belong to axes that are contracted here, so they are multiplied into the gradient
    before it is quantised along the remaining axes.
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
    """A frozen kernel [..., in, out], stored quantised; it takes the place of an array in a model.

    Attributes:
      qvalue: int8 [..., in, out]; for 'nf4' uint8 [..., in / 2, out], the codes of rows 2i and 2i + 1, the
        second in the upper half of a byte.
      scale: float32 [..., 1, out]; for 'nf4' [..., in / NF4_TILE, out].
      kind: 'int8' or 'nf4'.
      dtype: of the dequantised array.
      last: its last axes, if not (in, out).
    """

    qvalue: Any
    scale: Any
    kind: str = dataclasses.field(metadata=dict(static=True))
    dtype: Any = dataclasses.field(metadata=dict(static=True))
    last: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised array."""
        *lead, rows, columns = self.qvalue.shape
        return (*lead, *(self.last or (rows * (2 if self.kind == "nf4" else 1), columns)))

    def astype(self, dtype: Any) -> QuantizedKernel:
        """The same kernel with another `dtype`."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def reshape(self, *shape: int) -> QuantizedKernel:
        """Splits the rows or columns of a kernel [in, out] into heads; one size may be -1."""
        known = -math.prod(shape)
        return dataclasses.replace(
            self, last=tuple(math.prod(self.shape) // known if size == -1 else size for size in shape)
        )

    def __getitem__(self, layers: Any) -> QuantizedKernel:
        """Some layers of a stack; [...] is the whole kernel."""
        return self if layers is ... else jax.tree.map(lambda part: part[layers], self)

    @staticmethod
    def einsum(spec: str, x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
        """See `frozen_einsum`."""
        return frozen_einsum(spec, x, kernel)

    def dequantize(self) -> jax.Array:
        """The kernel as an array, computed in float32 as by `qwix.dequantize`."""
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
    """Qwix's values of 4-bit codes, selected bit by bit: TPUs gather single numbers slowly."""
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
    """`matmul.einsum` with a `QuantizedKernel`; only `x` has a gradient.

    The backward pass dequantises again, so no layer's kernel is kept as an array.
    """
    return matmul.einsum(spec, x, kernel.dequantize())


def _frozen_forward(spec: str, x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    return frozen_einsum(spec, x, kernel), kernel


def _frozen_backward(spec: str, kernel: QuantizedKernel, gradient: jax.Array) -> tuple[jax.Array, None]:
    factors, result = spec.split("->")
    first, second = factors.split(",")
    return matmul.einsum(f"{result},{second}->{first}", gradient, kernel.dequantize()), None


frozen_einsum.defvjp(_frozen_forward, _frozen_backward)
