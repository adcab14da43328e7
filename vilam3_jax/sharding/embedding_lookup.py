"""Rows of an embedding table that a sharded step stores split."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vilam3_jax.sharding import logical_axes


def lookup(
    ids: jax.Array, table: jax.Array, dtype: Any, stored: tuple[Any, ...] | None, lead: tuple[str | None, ...]
) -> jax.Array:
    """`table[ids]` as `dtype`; the gradients of repeated ids add up in the type of the table.

    In a sharded step a device looks up the ids of all devices that share its columns of the table, and the
    columns it found go to the rows they belong to (all-to-all). Neither the table nor its gradient is ever
    whole on a device; XLA makes it whole where a mesh axis splits the batch and not the table. A table whose
    columns lie over other axes than the batch's is left to XLA all the same.

    Args:
      ids: int [batch, length].
      table: [V, D].
      dtype: of the result.
      stored: mesh axes of the table's two dimensions; None leaves the placement to the partitioner.
      lead: logical axes of `ids`.

    Returns:
      [batch, length, D].
    """
    placed = logical_axes.placement()
    if placed is None or stored is None or ids.shape[0] % logical_axes.ways("batch"):
        return jnp.take(table, ids, axis=0).astype(dtype)
    mesh, spec = placed
    batch = logical_axes.mesh_axes("batch")
    rows, columns = (logical_axes.split_over(names) for names in stored)
    if set(rows) & set(batch) or set(columns) - set(batch):
        return jnp.take(table, ids, axis=0).astype(dtype)

    def local(ids: jax.Array, table: jax.Array) -> jax.Array:
        if columns:
            ids = jax.lax.all_gather(ids, columns, axis=0, tiled=True)
        if rows:
            ids = ids - jax.lax.axis_index(rows) * table.shape[0]
            own = (ids >= 0) & (ids < table.shape[0])
            x = jnp.where(own[..., None], jnp.take(table, ids, axis=0, mode="clip"), 0).astype(dtype)
            x = jax.lax.psum(x, rows)
        else:
            x = jnp.take(table, ids, axis=0).astype(dtype)
        return jax.lax.all_to_all(x, columns, split_axis=0, concat_axis=2, tiled=True) if columns else x

    names = spec(*lead)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(names, PartitionSpec(rows or None, columns or None)),
        out_specs=PartitionSpec(*names, None),
    )(ids, table)
