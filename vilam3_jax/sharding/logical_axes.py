"""Where activations live, by logical axis names, and weights while they are used.

Models say what an axis *is* (`batch`, `length`, `mlp` ...); the run's table says which mesh axes carry it.
Outside `activation_rules` the helpers do nothing, so models run unsharded in tests and notebooks.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None

# The inner part of `fsdp` on a torus of three dimensions. XLA has no reduce-scatter over all three (it makes
# an all-reduce of it, twice the bytes), but one over a plane, and one over the line across.
FSDP_LINE = "fsdp_line"


_OF_A_TOWER = {
    "heads": "tower_heads",
    "kv_heads": "tower_heads",
    "queries": "tower_queries",
    "mlp": "tower_mlp",
}


@dataclass(frozen=True)
class _Context:
    mesh: Mesh
    rules: Mapping[str, MeshAxes]
    weights: Mapping[str, PartitionSpec | list[PartitionSpec]]
    attention: str

    def spec(self, *logical_axes: str | None) -> PartitionSpec:
        unknown = [name for name in logical_axes if name is not None and name not in self.rules]
        if unknown:
            raise ValueError(f"no activation rule for {unknown}; known: {sorted(self.rules)}")
        return place(self.mesh, *(None if name is None else self.rules[name] for name in logical_axes))


_context: contextvars.ContextVar[_Context | None] = contextvars.ContextVar("activation_rules", default=None)


@contextlib.contextmanager
def activation_rules(
    mesh: Mesh,
    rules: Mapping[str, MeshAxes],
    attention: str = "auto",
    weights: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Makes `shard` place activations on `mesh` while the step is traced, and products find their weights.

    Args:
      mesh: the step's devices, of this host or of a topology that is only compiled for.
      rules: logical axis → mesh axes that carry it; None or "" for none; or the name of the logical axis that
        it goes with.
      attention: `config.attention`, which `ops.attention` reads.
      weights: parameter path → where it (or each of its arrays) is stored, see `products.linear`; products of
        other weights are left to the partitioner.
    """
    stored = {
        path: placed.spec
        if isinstance(placed, NamedSharding)
        else [part.spec for part in jax.tree.leaves(placed)]
        for path, placed in (weights or {}).items()
    }
    resolved = {name: _resolved(rules, axes) for name, axes in rules.items()}
    token = _context.set(_Context(mesh, resolved, stored, attention))
    try:
        yield
    finally:
        _context.reset(token)


def _resolved(rules: Mapping[str, MeshAxes], axes: MeshAxes) -> MeshAxes:
    return (rules[axes] if isinstance(axes, str) and axes in rules else axes) or None


@contextlib.contextmanager
def of_a_tower() -> Iterator[None]:
    """Inside, heads, queries and hidden units are placed by the towers' own rules (`tower_*`)."""
    context = _context.get()
    if context is None:
        yield
        return
    own = {name: context.rules[rule] for name, rule in _OF_A_TOWER.items() if rule in context.rules}
    token = _context.set(replace(context, rules={**context.rules, **own}))
    try:
        yield
    finally:
        _context.reset(token)


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Inside, devices that share a row take different parts of the batch: for what has no length to split."""
    context = _context.get()
    if context is None or ways("length") == 1:
        yield
        return
    batch = listed(context.rules["batch"]) + listed(context.rules["length"])
    token = _context.set(replace(context, rules={**context.rules, "batch": batch, "length": None}))
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
    return size(mesh_axes(logical_axis))


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """The mesh axes that really split an axis of this name; () outside `activation_rules`."""
    context = _context.get()
    return () if context is None else split_over(names(context.rules[logical_axis], context.mesh))


def split_over(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec that have more than one device, outermost first."""
    context = _context.get()
    if context is None:
        return ()
    return tuple(axis for axis in listed(axes) if context.mesh.shape[axis] > 1)


def size(axes: tuple[str, ...]) -> int:
    """Number of devices along mesh axes."""
    context = _context.get()
    return 1 if context is None else math.prod(context.mesh.shape[axis] for axis in axes)


def stored(path: str) -> Any:
    """The PartitionSpec of a parameter, or a list of those of its arrays, as `activation_rules` was told.

    None if it was not.
    """
    context = _context.get()
    return None if context is None else context.weights.get(path)


def listed(axes: MeshAxes) -> tuple[str, ...]:
    """An entry of a PartitionSpec as a tuple."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def names(axes: MeshAxes, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes of a rule's entry; 'fsdp' is two of them where `mesh` has it in two (see `FSDP_LINE`)."""
    said = listed(axes)
    if FSDP_LINE not in mesh.shape or FSDP_LINE in said:
        return said
    return tuple(name for axis in said for name in ((axis, FSDP_LINE) if axis == "fsdp" else (axis,)))


def place(mesh: Mesh, *axes: MeshAxes) -> PartitionSpec:
    """The PartitionSpec of a rule's mesh axes, one entry per dimension."""
    return entries(names(axis, mesh) for axis in axes)


def entries(axes: Iterable[tuple[str, ...]]) -> PartitionSpec:
    """A PartitionSpec from the mesh axes of each dimension."""
    return PartitionSpec(*(found[0] if len(found) == 1 else found or None for found in axes))


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
