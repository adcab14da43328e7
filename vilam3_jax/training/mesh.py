"""The device mesh, and where parameters, optimizer state and batches live on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vilam3_jax import compat
from vilam3_jax.config import MESH_AXES, ConfigDict
from vilam3_jax.errors import UserError
from vilam3_jax.training import tables

BATCH_AXES = ("data", "fsdp")
# Arrays [B, L] of packed rows, whose second axis lies over `context`.
ROW_ARRAYS = ("tokens", "segment_ids", "positions", "loss_weights", "visual_index")


def build_mesh(mesh_config: ConfigDict) -> Mesh:
    """Lays all devices out over the axes of `mesh_config`; one axis may be -1 and takes what is left.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    sizes = {axis: mesh_config[axis] for axis in MESH_AXES}
    count = len(jax.devices())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    bad = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if bad:
        raise UserError(f"config {', '.join(bad)}: an axis is at least 1, or -1 to take what is left")
    if len(open_axes) > 1:
        raise UserError(f"config mesh: only one axis may be -1, not {' and '.join(open_axes)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and count % fixed == 0:
        sizes[open_axes[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"config mesh ({shown}) does not divide the {count} device(s); change an axis, or "
            "mesh.cpu_devices for virtual CPU devices"
        )
    return compat.make_mesh([sizes[axis] for axis in MESH_AXES], MESH_AXES)


def parameter_shardings(
    shapes: Mapping[str, Any], rules: tuple[tuple[str, tuple[Any, ...]], ...], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Placement of each parameter.

    Args:
      shapes: path → array or ShapeDtypeStruct.
      rules: rows of (regex, mesh axes per dimension); missing trailing dimensions are replicated.
      mesh: the device mesh.

    Raises:
      UserError: no row matches a parameter, a row is longer than its parameter's rank, or a dimension
        does not divide by its axes.
    """
    placed = {}
    for path, axes in tables.resolve(rules, shapes, "parameter_rules", unused_ok=True).items():
        shape = shapes[path].shape
        if len(axes) > len(shape):
            raise UserError(f"config parameter_rules: {len(axes)} axes for {path} of shape {shape}")
        for size, axis in zip(shape, axes, strict=False):
            ways = math.prod(mesh.shape[a] for a in _names(axis))
            if size % ways:
                raise UserError(
                    f"mesh: {path} of shape {tuple(shape)} does not split {ways} ways over {axis}; "
                    "change the mesh or its row in parameter_rules"
                )
        placed[path] = NamedSharding(mesh, PartitionSpec(*axes))
    return placed


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Every leading axis of a batch is split over `data` and `fsdp`, the length of rows over `context`.

    Raises:
      UserError: a leading axis or the length does not divide.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    for name, value in batch.items():
        if value.shape[0] % ways:
            raise UserError(
                f"batch {name}: leading axis {value.shape[0]} does not divide over {ways} devices of "
                "mesh.data x mesh.fsdp; change data.global_rows, data.rows_per_group or the mesh"
            )
        if name in ROW_ARRAYS and value.shape[1] % mesh.shape["context"]:
            raise UserError(
                f"batch {name}: rows of {value.shape[1]} do not divide over mesh.context="
                f"{mesh.shape['context']}; change data.seq_len or the mesh"
            )

    def spec(name: str) -> PartitionSpec:
        split = name in ROW_ARRAYS and mesh.shape["context"] > 1
        return PartitionSpec(BATCH_AXES, "context") if split else PartitionSpec(BATCH_AXES)

    return {name: NamedSharding(mesh, spec(name)) for name in batch}


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of scalars."""
    return NamedSharding(mesh, PartitionSpec())


def replicated_fraction(shapes: Mapping[str, Any], placed: Mapping[str, NamedSharding]) -> float:
    """Share of parameter bytes whose array is not split at all (a watch on forgotten rules)."""
    size = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in shapes.items()}
    whole = sum(size[path] for path, sharding in placed.items() if sharding.is_fully_replicated)
    return whole / max(1, sum(size.values()))


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else tuple(axis)
