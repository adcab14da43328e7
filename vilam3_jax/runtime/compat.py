"""All code that depends on the versions of JAX and Flax.

Supported pairs: jax 0.10.2 with flax 0.12.8 (Python 3.11) and jax 0.12 with flax 0.12.12 (Python 3.12).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


def use_cpu_devices(count: int) -> None:
    """Replaces the devices by `count` virtual CPU devices; call it before the first use of a device.

    A collective blocks a thread of XLA's pool until its partners arrive, and a device may wait in several at
    once. XLA aborts the process if all threads of the pool, one per core (NPROC) or device, are blocked, so
    the pool is made larger. A matrix product is split into as many pieces as the pool has threads, which is a
    third slower if there are no more cores than devices (4 devices on 2 cores); there it runs on one thread.
    """
    cores = os.cpu_count() or 1
    os.environ["NPROC"] = str(max(16 * count, cores))
    if cores <= count:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    # Two concurrent programs could block each other in the same way.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def coordination_client() -> Any:
    """The key-value store that the processes of a run share; None for one process. JAX has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


class DoesNotFitTorus(ValueError):
    """The axes of a mesh do not fit the torus of the devices, even along parts of its sides."""


def make_mesh(sizes: Sequence[int], names: Sequence[str], devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh of `Auto` axes, along whole sides of the devices' torus if possible.

    `jax.make_mesh` takes sizes by position, as their keyword changed between jax 0.10 and 0.11.

    Raises:
      DoesNotFitTorus: see there.
    """
    sizes, names = tuple(sizes), tuple(names)
    types = (AxisType.Auto,) * len(names)  # the defaults of `jax.make_mesh` and `Mesh` differ
    # JAX raises NotImplementedError for axes that are not products of a torus's sides, or of parts of them.
    with contextlib.suppress(NotImplementedError):
        return jax.make_mesh(sizes, names, axis_types=types, devices=devices)
    try:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except NotImplementedError as error:
        raise DoesNotFitTorus(str(error)) from error
    return Mesh(placed, names, axis_types=types)


def join_meshes(meshes: Sequence[Mesh]) -> Mesh:
    """Concatenates equal meshes along their first axis."""
    joined = np.concatenate([mesh.devices for mesh in meshes])
    return Mesh(joined, meshes[0].axis_names, axis_types=meshes[0].axis_types)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Splits a module into its structure and nested dicts of arrays (or of ShapeDtypeStructs)."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: dict[str, Any]) -> Any:
    """Builds the module of `graphdef` with the nested arrays that `split` returned."""
    return nnx.merge(graphdef, params)


def equally_varying(*values: jax.Array) -> tuple[jax.Array, ...]:
    """Inside `shard_map`: marks all values as varying over every mesh axis over which any of them varies.

    `custom_vjp` requires gradients that vary over the same axes as its arguments.
    """
    varying = [jax.typeof(value).manual_axis_type.varying for value in values]
    everywhere = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(value, tuple(everywhere - own), to="varying") if everywhere - own else value
        for value, own in zip(values, varying, strict=True)
    )
