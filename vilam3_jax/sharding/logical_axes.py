"""Logical axes of activations, and the mesh axes that carry them.

Models name the axes of activations (`batch`, `length`, `mlp` ...); `config.activation_rules` maps them to
mesh axes. Outside `activation_rules` the helpers do nothing, so models run unsharded in tests and notebooks.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vilam3_jax.errors import UserError

MeshAxes = str | tuple[str, ...] | None

# The part of `fsdp` along the third axis of a torus. XLA lowers a reduce-scatter over three torus axes to an
# all-reduce (twice the bytes), but has a reduce-scatter for a plane and one for a line.
FSDP_LINE = "fsdp_line"

# Default table: logical axis → mesh axes, or the logical axis whose rule it shares.
ACTIVATION_RULES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    # If heads are not divisible by `tensor`, set both to "" and this to "tensor": each device then computes
    # the attention of a part of the queries.
    "queries": "",
    "mlp": "tensor",
    "vocab": "tensor",
    # Vision and text towers follow the rules above unless these name mesh axes ("" for none).
    "tower_heads": "heads",
    "tower_queries": "queries",
    "tower_mlp": "mlp",
}
_IN_TOWERS = dict(heads="tower_heads", kv_heads="tower_heads", queries="tower_queries", mlp="tower_mlp")


def check_rules(rules: Mapping[str, MeshAxes]) -> None:
    """Checks `config.activation_rules`; raises UserError for a rule with other axes than these.

    Batches are split over `data` and `fsdp`, rows over `context`, other axes over `tensor` or not at all.
    """

    def mesh_axes(name: str) -> tuple[str, ...]:
        axes, shared = rules[name], name.removeprefix("tower_")
        return mesh_axes(shared) if shared != name and axes == shared else as_tuple(axes)

    own = {"batch": [("data", "fsdp")], "length": [(), ("context",)]}
    for name, axes in rules.items():
        allowed = own.get(name, [(), ("tensor",)])
        if mesh_axes(name) not in allowed:
            choices = [" and ".join(choice) or "'' for none" for choice in reversed(allowed)]
            as_shared = f", or {name.removeprefix('tower_')!r}" if name.startswith("tower_") else ""
            raise UserError(
                f"config activation_rules.{name}={axes!r}: must be {' or '.join(choices)}{as_shared}"
            )
    for tower in ("", "tower_"):
        if mesh_axes(f"{tower}heads") and mesh_axes(f"{tower}queries"):
            raise UserError(
                f"config activation_rules: {tower}heads and {tower}queries cannot both be split over tensor; "
                "set one to ''"
            )


@dataclass(frozen=True)
class _Context:
    mesh: Mesh
    rules: Mapping[str, MeshAxes]

    def spec(self, *logical_axes: str | None) -> PartitionSpec:
        unknown = [name for name in logical_axes if name is not None and name not in self.rules]
        if unknown:
            raise ValueError(f"no activation rule for {unknown}; known: {sorted(self.rules)}")
        return partition_spec(self.mesh, *(None if n is None else self.rules[n] for n in logical_axes))


_context: contextvars.ContextVar[_Context | None] = contextvars.ContextVar("activation_rules", default=None)


@contextlib.contextmanager
def activation_rules(mesh: Mesh, rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """Makes `shard` place activations on `mesh` while a step is traced.

    Args:
      mesh: mesh of the step; real devices or an ahead-of-time topology.
      rules: logical axis → mesh axes, None or "" for none, or another logical axis whose rule applies.
    """
    resolved = {
        name: (rules[axes] if isinstance(axes, str) and axes in rules else axes) or None
        for name, axes in rules.items()
    }
    with _activated(_Context(mesh, resolved)):
        yield


@contextlib.contextmanager
def _activated(context: _Context | None) -> Iterator[None]:
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


@contextlib.contextmanager
def whole_sequences(**rules: MeshAxes) -> Iterator[None]:
    """Context (or decorator) in which `length` is not split, for modules other than the LLM.

    `rules` replace those of the step.
    """
    context = _context.get()
    with _activated(context and replace(context, rules={**context.rules, **rules, "length": None})):
        yield


@contextlib.contextmanager
def tower_rules() -> Iterator[None]:
    """`whole_sequences` with the towers' own rules (`tower_*`)."""
    rules = context.rules if (context := _context.get()) else {}
    with whole_sequences(**{name: rules[rule] for name, rule in _IN_TOWERS.items() if rule in rules}):
        yield


@contextlib.contextmanager
def batch_over_length() -> Iterator[None]:
    """Like `whole_sequences`, but shards the batch over the axes of `length` as well."""
    rules = context.rules if (context := _context.get()) else {"batch": None, "length": None}
    with whole_sequences(batch=as_tuple(rules["batch"]) + as_tuple(rules["length"])):
        yield


def current() -> tuple[Mesh, Callable[..., PartitionSpec]] | None:
    """(mesh, logical axes → PartitionSpec) of the step being traced, for `shard_map`; None outside a step."""
    context = _context.get()
    return None if context is None else (context.mesh, context.spec)


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': the target of the step being traced; outside one, JAX's default."""
    context = _context.get()
    return jax.default_backend() if context is None else context.mesh.devices.flat[0].platform


def axis_size(logical_axis: str) -> int:
    """Number of shards of a logical axis; 1 outside `activation_rules`."""
    return devices_along(mesh_axes(logical_axis))


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """The mesh axes of size > 1 that carry a logical axis; () outside `activation_rules`."""
    context = _context.get()
    return () if context is None else split_over(expanded(context.rules[logical_axis], context.mesh))


def split_over(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of size > 1 in an entry of a PartitionSpec, outermost first."""
    context = _context.get()
    if context is None:
        return ()
    return tuple(axis for axis in as_tuple(axes) if context.mesh.shape[axis] > 1)


def devices_along(axes: tuple[str, ...]) -> int:
    """Number of devices along mesh axes."""
    context = _context.get()
    return 1 if context is None else math.prod(context.mesh.shape[axis] for axis in axes)


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """An entry of a PartitionSpec or of a rule as a tuple."""
    return (axes,) if isinstance(axes, str) and axes else tuple(axes or ())


def expanded(axes: MeshAxes, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes of a rule's entry; 'fsdp' is two axes if `mesh` splits it (see `FSDP_LINE`)."""
    named = as_tuple(axes)
    if FSDP_LINE not in mesh.shape or FSDP_LINE in named:
        return named
    return tuple(name for axis in named for name in ((axis, FSDP_LINE) if axis == "fsdp" else (axis,)))


def partition_spec(mesh: Mesh, *axes: MeshAxes) -> PartitionSpec:
    """The PartitionSpec of a rule's mesh axes, one entry per dimension."""
    return from_tuples(expanded(axis, mesh) for axis in axes)


def from_tuples(axes: Iterable[tuple[str, ...]]) -> PartitionSpec:
    """A PartitionSpec from the mesh axes of each dimension."""
    return PartitionSpec(*(found[0] if len(found) == 1 else found or None for found in axes))


def shard(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrains `x` to the mesh axes of its logical axes, one name (None: replicated) per dimension.

    Raises:
      ValueError: the number of names differs from the rank, or a name has no rule.
    """
    context = _context.get()
    if context is None:
        return x
    if len(logical_axes) != x.ndim:
        raise ValueError(f"{len(logical_axes)} axis names for an array of rank {x.ndim}: {logical_axes}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(context.mesh, context.spec(*logical_axes)))
