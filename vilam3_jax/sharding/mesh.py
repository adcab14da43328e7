"""The device mesh, and the shardings of parameters and batches on it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import compat
from vilam3_jax.runtime.settings import Section, setting
from vilam3_jax.sharding import logical_axes, path_rules

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
_MOST_REPLICATED = 0.05  # of the parameters' bytes; models smaller than the next may replicate more
_LEAST_REPLICATED_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """The section `mesh`: sizes of the mesh axes, one of which may be -1 and takes the remaining devices.

    Attributes:
      data: replicas of the parameters.
      fsdp: shards of parameters and batch.
      context: shards of the length of rows.
      tensor: shards of heads and hidden units.
      cpu_devices: virtual CPU devices to run on; 0 for the real devices.
    """

    key = "mesh"
    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    cpu_devices: int = setting(default=0, at_least=0)


def build_mesh(mesh_config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges `devices` (by default all) over the axes of `mesh_config`.

    TPU slices are laid out along `data`, the outermost axis, so that only gradients cross the network between
    them.

    Raises:
      UserError: the product of the axes is not the number of devices, `data` is not a multiple of the
        slices, or the axes do not fit the torus.
    """

    def shown() -> str:
        return ", ".join(f"{axis}={size}" for axis, size in sizes.items())

    sizes = {axis: getattr(mesh_config, axis) for axis in MESH_AXES}
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    bad = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if bad:
        raise UserError(f"config {', '.join(bad)}: an axis is at least 1, or -1 for the remaining devices")
    if len(open_axes) > 1:
        raise UserError(f"config mesh: only one axis may be -1, not {' and '.join(open_axes)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and count % fixed == 0:
        sizes[open_axes[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        raise UserError(
            f"config mesh ({shown()}) does not match the {count} device(s); change an axis, or "
            "mesh.cpu_devices for virtual CPU devices"
        )
    slices = _slices(devices)
    if sizes["data"] % len(slices):
        raise UserError(
            f"config mesh.data={sizes['data']}: {len(slices)} slices are laid out along it, so it must be "
            "a multiple; make mesh.fsdp at most a slice"
        )
    if (line := _line(sizes["fsdp"], slices[0])) > 1:
        data, fsdp = sizes.pop("data"), sizes.pop("fsdp") // line
        sizes = {"data": data, "fsdp": fsdp, logical_axes.FSDP_LINE: line, **sizes}
    try:
        within = [sizes["data"] // len(slices), *list(sizes.values())[1:]]
        return compat.join_meshes([compat.make_mesh(within, list(sizes), devices) for devices in slices])
    except compat.DoesNotFitTorus as error:
        raise UserError(
            f"config mesh ({shown()}) does not fit this torus: every axis must be a product of its sides "
            "or of parts of them; change mesh.data and mesh.fsdp"
        ) from error


def decoding_mesh(mesh: Mesh | str | int | None) -> Mesh | None:
    """The mesh of a model that generates, all of whose devices share the heads and hidden units.

    Args:
      mesh: the number of devices, or the same as "tensor=4"; -1 for all. Or a `Mesh`, whose only axis of more
        than one device is `tensor`. None for one device, or for all devices of several processes.

    Returns:
      A mesh with the axes `MESH_AXES`; None for the first device.

    Raises:
      UserError: it is none of these, there are not so many devices, or a process would have none of them.
    """
    several = jax.process_count() > 1
    if mesh is None:
        mesh = -1 if several else 1
    if isinstance(mesh, Mesh):
        if others := [f"{axis}={size}" for axis, size in mesh.shape.items() if axis != "tensor" and size > 1]:
            raise UserError(
                f"mesh {', '.join(others)}: a model that generates is split along the axis tensor alone"
            )
        devices = list(mesh.devices.flat)
    else:
        count = _tensor_size(mesh) if isinstance(mesh, str) else mesh
        every = jax.devices()
        if count != -1 and not 1 <= count <= len(every):
            raise UserError(f"mesh tensor={count}: must be 1 to {len(every)}, the number of devices, or -1")
        devices = every if count == -1 else every[:count]
        if len(devices) == 1:
            return None
    if several and len(devices) != len(jax.devices()):
        raise UserError(
            f"mesh of {len(devices)} devices: the processes have {len(jax.devices())}, and all must take "
            "part; leave the mesh out"
        )
    return build_mesh(MeshConfig(data=1, fsdp=1, tensor=len(devices)), devices)


def _tensor_size(text: str) -> int:
    axis, _, size = text.partition("=")
    if axis != "tensor" or not re.fullmatch(r"-1|\d{1,6}", size):
        raise UserError(f"mesh {text!r}: must be like tensor=4, or tensor=-1 for all devices")
    return int(size)


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each TPU slice; a single group for other devices (a GPU's `slice_index` is its host)."""
    if devices[0].platform != "tpu":
        return [list(devices)]
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [slices[index] for index in sorted(slices)]


def _line(fsdp: int, devices: Sequence[Any]) -> int:
    """Returns the size of the axis `logical_axes.FSDP_LINE`, which is part of `fsdp`; 1 if it is not used."""
    if devices[0].platform != "tpu":
        return 1
    torus = sorted(len(set(places)) for places in zip(*(device.coords for device in devices), strict=True))
    plane = torus[-1] * torus[-2]
    return fsdp // plane if torus[0] > 1 and fsdp > plane and fsdp % plane == 0 else 1


def parameter_shardings(
    shapes: Mapping[str, Any], rules: Sequence[Any], family_rules: Sequence[Any], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Returns path → sharding of each parameter.

    A row is (regex, mesh axes per dimension, fallbacks ...); missing trailing dimensions are replicated. The
    first spec that divides the parameter evenly is used; specs over `fsdp` are also tried without
    `logical_axes.FSDP_LINE`.

    Args:
      shapes: path → array or ShapeDtypeStruct.
      rules: rows of the config, which come first.
      family_rules: rows of the model families, which may match no parameter.
      mesh: the device mesh.

    Raises:
      UserError: no row matches a parameter, a row of the config matches none, a spec is longer than its
        parameter's rank, no spec of a row divides a dimension, or too many bytes are replicated.
    """
    for row in rules:
        if not isinstance(row, tuple | list) or len(row) < 2:
            raise UserError(f"config parameter_rules: {row!r} is not a row (regular expression, axes, ...)")
        unknown = {axis for axes in row[1:] for entry in axes for axis in logical_axes.as_tuple(entry)}
        if unknown := unknown - set(MESH_AXES):
            raise UserError(
                f"config parameter_rules: {row!r} names {', '.join(sorted(map(str, unknown)))}; axes are "
                f"{', '.join(MESH_AXES)}"
            )
    table = [(row[0], row[1:]) for row in (*rules, *family_rules)]
    optional = [row[0] for row in family_rules]
    placed = {}
    for path, choices in path_rules.resolve(table, shapes, "parameter_rules", optional=optional).items():
        shape = tuple(shapes[path].shape)
        for axes in choices:
            if len(axes) > len(shape):
                raise UserError(f"config parameter_rules: {len(axes)} axes for {path} of shape {shape}")
        specs = [spec for axes in choices for spec in _candidates(mesh, axes)]
        fitting = (spec for spec in specs if not _undivided(shape, spec, mesh))
        if (spec := next(fitting, None)) is None:
            size, axis, count = _undivided(shape, specs[0], mesh)[0]
            raise UserError(
                f"mesh: {path} of shape {shape} cannot be split into {count} over {axis}, as {size} is not "
                "divisible; make the axis smaller (the rest to mesh.data) or change parameter_rules"
            )
        placed[path] = NamedSharding(mesh, spec)
    _check_replicated(shapes, placed, mesh)
    return placed


def _check_replicated(shapes: Mapping[str, Any], placed: Mapping[str, NamedSharding], mesh: Mesh) -> None:
    """Refuses rules that replicate many bytes although the mesh has axes to split them over."""
    if mesh.size == mesh.shape["data"] * mesh.shape["context"]:
        return
    size = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in shapes.items()}
    whole = {path: size[path] for path, sharding in placed.items() if sharding.is_fully_replicated}
    if sum(whole.values()) > max(_MOST_REPLICATED * sum(size.values()), _LEAST_REPLICATED_BYTES):
        largest = sorted(whole, key=lambda path: -whole[path])[:3]
        raise UserError(
            f"config parameter_rules: {sum(whole.values()) / 2**20:,.0f} of "
            f"{sum(size.values()) / 2**20:,.0f} MiB would be replicated on every device, such as "
            f"{', '.join(largest)}; give them rows with axes, or use mesh.data in place of mesh.fsdp"
        )


def _candidates(mesh: Mesh, axes: Sequence[Any]) -> Iterator[PartitionSpec]:
    spec = logical_axes.partition_spec(mesh, *axes)
    yield spec
    if logical_axes.FSDP_LINE in mesh.shape:
        yield logical_axes.from_tuples(
            tuple(axis for axis in logical_axes.as_tuple(entry) if axis != logical_axes.FSDP_LINE)
            for entry in spec
        )


def _undivided(shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> list[tuple[int, Any, int]]:
    """(size, mesh axes, number of parts) of the dimensions that `spec` does not divide."""
    undivided = []
    for size, axes in zip(shape, spec, strict=False):
        count = math.prod(mesh.shape[axis] for axis in logical_axes.as_tuple(axes))
        undivided += [(size, axes, count)] if size % count else []
    return undivided


def batch_sharding(name: str, shape: Sequence[int], mesh: Mesh, is_sequence: bool) -> NamedSharding:
    """Splits the leading axis of a batch's field over `data` and `fsdp`, the length of rows over `context`.

    `shape` is that of the global array; with `is_sequence` its second axis is the length of packed rows.

    Raises:
      UserError: the leading axis or the length is not divisible.
    """
    devices = math.prod(mesh.shape[axis] for axis in logical_axes.expanded(BATCH_AXES, mesh))
    if shape[0] % devices:
        raise UserError(
            f"batch {name}: leading axis {shape[0]} is not divisible by the {devices} devices of "
            "mesh.data x mesh.fsdp; change data.global_rows, data.rows_per_group or the mesh"
        )
    if is_sequence and shape[1] % mesh.shape["context"]:
        raise UserError(
            f"batch {name}: rows of {shape[1]} are not divisible by mesh.context={mesh.shape['context']}; "
            "change data.seq_len or the mesh"
        )
    length = ("context",) if is_sequence and mesh.shape["context"] > 1 else ()
    return NamedSharding(mesh, logical_axes.partition_spec(mesh, BATCH_AXES, *length))


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of whole rows, split over `data` and `fsdp`."""
    return NamedSharding(mesh, logical_axes.partition_spec(mesh, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars."""
    return NamedSharding(mesh, PartitionSpec())
