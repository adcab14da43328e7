"""Quantised matrix products and quantised frozen kernels, by Qwix (an optional package).

`einsum` quantises both factors of a product to int8 or float8. Scales are dynamic, the largest magnitude over
the contracted axes, one per remaining channel (a row of activations, a column of a kernel). Under `shard_map`
they are taken over the device's part of the contraction, without communication: a kernel whose rows are split
over `tensor` has one scale per column and device, as with Qwix's `tile_size`.

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
from vilam3_jax.sharding import logical_axes, matmul

MATMULS = ("int8", "fp8")
KERNELS = ("int8", "nf4")
_BLOCK = 1 << 19  # numbers of an int8 kernel that a CPU converts at a time
_MAX_CONVERTED = 1 << 22  # numbers of the largest kernel that a CPU converts at once
NF4_TILE = 64  # rows of a kernel that share a scale, as in QLoRA
# Name → types of the factors and of an incoming gradient.
_TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


@dataclasses.dataclass(frozen=True)
class QuantizationConfig(Section):
    """The section `quantization`.

    Attributes:
      matmul: 'int8' or 'fp8' for the products of `modules`; '' for none.
      gradients: also quantise the products of the backward pass.
      frozen: storage format of the kernels of `modules`, which must be frozen: 'int8' or 'nf4'; '' for none.
      modules: regular expression over linear layers, such as 'llm/layers/.*'; the LLM's head is excluded.
    """

    key = "quantization"
    matmul: str = setting(default="", choices=("", *MATMULS))
    gradients: bool = False
    frozen: str = setting(default="", choices=("", *KERNELS))
    modules: str = r"llm/layers/.*"

    def validate(self) -> None:
        """Checks combinations of settings."""
        if self.gradients and not self.matmul:
            raise UserError("config quantization.gradients=True needs quantization.matmul")
        if self.matmul and self.frozen:
            raise UserError(
                f"config quantization.matmul={self.matmul!r} and frozen={self.frozen!r}: kernels that are "
                "stored quantised are multiplied dequantised; leave one of them empty"
            )
        try:
            re.compile(self.modules)
        except re.error as error:
            raise self.error("modules", f"is not a regular expression: {error}") from error

    def matching(self, shapes: Mapping[str, Any]) -> list[str]:
        """Paths of the kernels that `modules` matches; raises UserError if there are none.

        Args:
          shapes: path → ShapeDtypeStruct of every parameter.
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
      gradients: also quantise the two products of the backward pass, which otherwise use the unquantised
        factors (straight-through estimator).
    """

    kind: str
    gradients: bool = False

    def __call__(self, spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return einsum(self, spec, x, kernel)


def check_installed(setting: str, otherwise: str) -> None:
    """Raises UserError if Qwix, which `setting` needs, is not installed; `otherwise` is what else helps."""
    if importlib.util.find_spec("qwix") is None:
        raise UserError(
            f"{setting} needs the package qwix, which is not installed; pip install -e '.[quant]', "
            f"or {otherwise}"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def einsum(how: QuantizedMatmul, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays, quantised first; the result is scaled in float32 and has the type of `x`.

    Args:
      how: types of the factors.
      spec: such as 'abi,io->abo': one letter per axis, each in two of the three terms, and those of the
        result in the order of the factors.
      x: first factor.
      y: second factor.
    """
    import qwix

    first, second, result = _terms(spec)
    kind, _ = _TYPES[how.kind]
    factors = _quantize(x, first, result, kind), _quantize(y, second, result, kind)
    return qwix.einsum(spec, *factors).astype(x.dtype)


def _terms(spec: str) -> list[str]:
    return spec.replace("->", ",").split(",")


def _quantize(array: jax.Array, letters: str, kept: str, kind: Any) -> Any:
    """A `qwix.QArray` with one float32 scale per index of the axes in `kept`."""
    import qwix

    channels = [axis for axis, letter in enumerate(letters) if letter in kept]
    return qwix.quantize(array.astype(jnp.float32), kind, channelwise_axes=channels)


def quantize_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Int8 like `x` [..., n], and one float32 scale [...] for each vector of n numbers.

    The largest magnitude becomes 127. By default, Qwix makes it 127.5, whose rounding depends on the last bit
    of the input: values that differ by rounding would often differ by a whole step afterwards.
    """
    import qwix

    found = qwix.quantize(
        x.astype(jnp.float32),
        jnp.int8,
        channelwise_axes=range(x.ndim - 1),
        calibration_method=f"absmax,{127.5 / 127}",
    )
    return found.qvalue, found.scale[..., 0]


def _forward(how: QuantizedMatmul, spec: str, x: Any, y: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    # Save unquantised operands: a quantised kernel would be an extra copy per scanned layer.
    kept = x.value if y.perturbed else None, y.value if x.perturbed else None
    return einsum(how, spec, x.value, y.value), kept


def _backward(how: QuantizedMatmul, spec: str, kept: tuple[Any, Any], gradient: Any) -> tuple[Any, Any]:
    if isinstance(gradient, SymbolicZero):
        return None, None
    first, second, result = _terms(spec)
    x, y = kept

    def product(factor: jax.Array, letters: str, wanted: str) -> jax.Array:
        import qwix

        spec = f"{result},{letters}->{wanted}"
        if not how.gradients:
            return matmul.einsum(spec, gradient, factor)
        forward, backward = _TYPES[how.kind]
        quantized = _quantize(factor, letters, result, forward)
        # The factor's scales belong to axes that are contracted here, so they are multiplied into the
        # gradient before it is quantised along the remaining axes.
        along = [quantized.scale.shape[letters.index(axis)] if axis in letters else 1 for axis in result]
        scaled = gradient.astype(jnp.float32) * quantized.scale.reshape(along)
        out = qwix.einsum(spec, _quantize(scaled, result, wanted, backward), quantized.qvalue)
        return out.astype(factor.dtype)

    return (
        None if y is None else product(y, second, first),
        None if x is None else product(x, first, second),
    )


einsum.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A frozen kernel [..., in, out], stored quantised; it replaces an array in a model.

    Attributes:
      qvalue: int8 [..., in, out]; for 'nf4' uint8 [..., in / 2, out], the codes of rows 2i and 2i + 1, the
        second in the upper half of a byte.
      scale: float32 [..., 1, out]; for 'nf4' [..., in / NF4_TILE, out].
      kind: 'int8' or 'nf4'.
      dtype: type of the dequantised array.
      last: last axes of the dequantised array, if not (in, out).
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

    @property
    def T(self) -> QuantizedKernel:
        """The transposed matrix; for 'int8' alone."""
        return dataclasses.replace(self, qvalue=self.qvalue.mT, scale=self.scale.mT)

    def __getitem__(self, layers: Any) -> QuantizedKernel:
        """Selects layers of a stack; [...] returns the whole kernel."""
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
    """Quantises kernels [..., in, out] with one scale per column ('int8') or per tile of a column ('nf4')."""
    import qwix

    rows, nf4 = kernel.ndim - 2, kind == "nf4"
    channels = [axis for axis in range(kernel.ndim) if axis != rows]
    axes: dict[str, Any] = dict(channelwise_axes=channels, tiled_axes={rows: NF4_TILE} if nf4 else {})
    found = qwix.quantize(kernel.astype(jnp.float32), "nf4" if nf4 else jnp.int8, **axes)
    qvalue = found.qvalue
    if nf4:
        codes = qvalue.astype(jnp.uint8).reshape(*kernel.shape[:-2], -1, 2, kernel.shape[-1])
        qvalue = codes[..., 0, :] | codes[..., 1, :] << 4
    return QuantizedKernel(qvalue, found.scale, kind, kernel.dtype)


def quantize_table(table: jax.Array) -> QuantizedKernel:
    """Quantises [V, D] to int8 with one scale per row, the transpose of a kernel with one per column."""
    return quantize_kernel(table.T, "int8").T


def scaled_einsum(
    spec: str, x: jax.Array, kernel: QuantizedKernel, preferred_element_type: Any = None
) -> jax.Array:
    """`jnp.einsum` with the integers of an 'int8' kernel, whose scales multiply the sums.

    Int8 is exact in bfloat16, so nothing but the kernel is rounded, and there is nothing to compute before
    the product but a conversion, which compilers fuse into it.

    Args:
      spec: see `matmul.einsum`; the axes of columns are the last ones of the result.
      x: first factor.
      kernel: second factor, with one scale per column.
      preferred_element_type: type of the result; by default that of `x`.
    """
    _, second, result = _terms(spec)
    columns = [size for letter, size in zip(second, kernel.shape, strict=True) if letter in result]
    on_one_cpu = logical_axes.platform() == "cpu" and logical_axes.current() is None
    if on_one_cpu and kernel.qvalue.size > _MAX_CONVERTED:
        lead = x.shape[: len(result) - len(columns)]
        axis = 0 if second[0] in result else 1  # of columns
        sums = _in_blocks(x.reshape(math.prod(lead), -1), kernel.qvalue, axis).reshape(*lead, *columns)
    else:
        sums = matmul.einsum(spec, x, kernel.qvalue.reshape(kernel.shape).astype(x.dtype), jnp.float32)
    return (sums * kernel.scale.reshape(columns)).astype(preferred_element_type or x.dtype)


def _in_blocks(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """Float32 product of x [n, in] and an int8 kernel, which is converted one block of columns at a time.

    On CPUs, products read converted kernels from memory: a block stays in the cache. `axis` is that of the
    columns of the kernel.
    """
    width = max(1, _BLOCK // kernel.shape[1 - axis])
    count, rest = divmod(kernel.shape[axis], width)

    def block(first: jax.Array | int, size: int) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(kernel, first, size, axis).astype(x.dtype)
        return matmul.einsum("ai,oi->ao" if axis == 0 else "ai,io->ao", x, part, jnp.float32)

    blocks = jax.lax.map(lambda number: block(number * width, width), jnp.arange(count))
    whole = blocks.swapaxes(0, 1).reshape(x.shape[0], count * width)
    return jnp.concatenate([whole, block(count * width, rest)], axis=1)


def _nf4_values(codes: jax.Array) -> jax.Array:
    """Qwix's values of 4-bit codes, selected bit by bit, as TPUs gather single numbers slowly."""
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
    """`matmul.einsum` with a kernel that has no gradient; the backward pass dequantises it again."""
    return matmul.einsum(spec, x, kernel.dequantize())


def _frozen_forward(spec: str, x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    return frozen_einsum(spec, x, kernel), kernel


def _frozen_backward(spec: str, kernel: QuantizedKernel, gradient: jax.Array) -> tuple[jax.Array, None]:
    first, second, result = _terms(spec)
    return matmul.einsum(f"{result},{second}->{first}", gradient, kernel.dequantize()), None


frozen_einsum.defvjp(_frozen_forward, _frozen_backward)
