"""Matrix products in the precision that JAX is set to, on CPUs too.

With `jax_default_matmul_precision="bfloat16"` factors are rounded to bfloat16 and sums are float32: what
a TPU does with float32 arrays by default. XLA for CPUs accepts the setting and computes in float32 all the
same, but uses a processor's bfloat16 units where it is given bfloat16 factors (with AMX four to five times as
fast). Here the factors are rounded by ourselves, those of the gradients' products too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

_ROUNDED = "bfloat16"
_TYPE = jnp.bfloat16


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
