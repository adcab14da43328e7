"""Lookup in a sharded embedding table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.weights import as_weight


def lookup(ids: jax.Array, table: Any, dtype: Any) -> jax.Array:
    """`table[ids]` as `dtype`; gradients of repeated ids add up in the type of the table.

    In a sharded step, each device looks up in its shard of the columns the ids of all devices along the axes
    that shard the columns. An all-to-all then returns full-width rows to their owners. The table and its
    gradient stay sharded, except over mesh axes that shard the batch but not the table. If the columns are
    sharded over other axes than the batch, or the rows over axes of the batch, XLA partitions the lookup.

    Args:
      ids: int [batch, length].
      table: [V, D]: an array, a `quantized.QuantizedKernel` with one scale per row, or a `Weight` of one.
      dtype: type of the result [batch, length, D].
    """
    weight = as_weight(table)
    step = logical_axes.current()
    if step is None or not weight.specs or ids.shape[0] % logical_axes.axis_size("batch"):
        return _take(weight.value, ids, dtype)
    mesh, partition_spec = step
    batch = logical_axes.mesh_axes("batch")
    rows, columns = (logical_axes.split_over(axes) for axes in weight.matrix_specs[0])
    if set(rows) & set(batch) or set(columns) - set(batch):
        return _take(weight.value, ids, dtype)

    def local(ids: jax.Array, table: Any) -> jax.Array:
        if columns:
            ids = jax.lax.all_gather(ids, columns, axis=0, tiled=True)
        if rows:
            ids = ids - jax.lax.axis_index(rows) * table.shape[0]
            own = (ids >= 0) & (ids < table.shape[0])
            x = jnp.where(own[..., None], _take(table, ids, dtype, mode="clip"), 0)
            x = jax.lax.psum(x, rows)
        else:
            x = _take(table, ids, dtype)
        return jax.lax.all_to_all(x, columns, split_axis=0, concat_axis=2, tiled=True) if columns else x

    lead = partition_spec("batch", "length")
    specs = [
        PartitionSpec(*(logical_axes.split_over(axes) or None for axes in spec))
        for spec in weight.matrix_specs
    ]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(lead, jax.tree.unflatten(jax.tree.structure(weight.value), specs)),
        out_specs=PartitionSpec(*lead, None),
    )(ids, weight.value)


def _take(table: Any, ids: jax.Array, dtype: Any, **options: Any) -> jax.Array:
    rows = jax.tree.map(lambda part: jnp.take(part, ids, axis=0, **options), table)
    return (rows.dequantize() if hasattr(rows, "dequantize") else rows).astype(dtype)
