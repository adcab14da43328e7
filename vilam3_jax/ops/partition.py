"""Activation sharding by logical axis names.

Models say what an axis *is* (`batch`, `length`, `mlp` ...); the run's table says which mesh axes carry it.
Outside `activation_rules` the helper does nothing, so models run unsharded in tests and notebooks.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class _Context:
    mesh: Mesh
    rules: Mapping[str, MeshAxes]
    attention: str

    def spec(self, *logical_axes: str | None) -> PartitionSpec:
        unknown = [name for name in logical_axes if name is not None and name not in self.rules]
        if unknown:
            raise ValueError(f"no activation rule for {unknown}; known: {sorted(self.rules)}")
        return PartitionSpec(*(None if name is None else self.rules[name] for name in logical_axes))


_context: contextvars.ContextVar[_Context | None] = contextvars.ContextVar("activation_rules", default=None)


@contextlib.contextmanager
def activation_rules(mesh: Mesh, rules: Mapping[str, MeshAxes], attention: str = "auto") -> Iterator[None]:
    """Makes `shard` place activations on `mesh` by `rules` while the step is traced.

    Args:
      mesh: the step's devices, of this host or of a topology that is only compiled for.
      rules: logical axis -> mesh axes.
      attention: `config.attention`, which `ops.attention` reads.
    """
    token = _context.set(_Context(mesh, dict(rules), attention))
    try:
        yield
    finally:
        _context.reset(token)


def placement() -> tuple[Mesh, Callable[..., PartitionSpec]] | None:
    """(mesh, logical axes -> PartitionSpec) of the step being traced, for `shard_map`; None outside one."""
    context = _context.get()
    return None if context is None else (context.mesh, context.spec)


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the step being traced is for; outside one, JAX's default."""
    context = _context.get()
    return jax.default_backend() if context is None else context.mesh.devices.flat[0].platform


def attention_choice() -> str:
    """`config.attention` of the step being traced; 'auto' outside one."""
    context = _context.get()
    return "auto" if context is None else context.attention


def ways(logical_axis: str) -> int:
    """Into how many parts an axis of this name is cut; 1 outside `activation_rules`."""
    context = _context.get()
    axes = None if context is None else context.rules[logical_axis]
    if context is None or axes is None:
        return 1
    return math.prod(context.mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes))


def shard(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrains `x` to the mesh axes of its logical axes.

    Args:
      x: any array.
      *logical_axes: one name (or None: replicated) per dimension of `x`.

    Raises:
      ValueError: the number of names differs from the rank, or a name has no rule.
    """
    context = _context.get()
    if context is None:
        return x
    if len(logical_axes) != x.ndim:
        raise ValueError(f"{len(logical_axes)} axis names for an array of rank {x.ndim}: {logical_axes}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(context.mesh, context.spec(*logical_axes)))
