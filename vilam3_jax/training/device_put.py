"""Transfer of the batch to the mesh, and the units (see `data.batch_formats`) that a process loads."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vilam3_jax.data.batches import AnyBatch, map_fields
from vilam3_jax.training.program import field_sharding


class DevicePut:
    """Makes global arrays from the units that each process loads.

    If `tensor` or `context` spans processes, several of them load the same units.

    Attributes:
      local_units: ascending indices of the units on devices of this process; see `build_loader`.
    """

    def __init__(self, units: int, mesh: Mesh) -> None:
        """Finds the local units of a global batch of `units`.

        Raises:
          UserError: the batch is not divisible over the mesh.
        """
        self._units, self._mesh = units, mesh
        sharding = field_sharding("images", (units,), mesh)
        indices = sharding.addressable_devices_indices_map((units,)).values()
        parts = [index[0] for index in indices if index]
        self.local_units = sorted({number for part in parts for number in range(*part.indices(units))})

    def __call__(self, batch: AnyBatch) -> AnyBatch:
        """The global batch of `jax.Array`s, from NumPy arrays of the local units."""
        return map_fields(self._put, batch)

    def _put(self, name: str, value: np.ndarray) -> jax.Array:
        rows = value.shape[0] // len(self.local_units)
        shape = (self._units * rows, *value.shape[1:])

        def read(index: Any) -> np.ndarray:
            """A device's part; its units are contiguous in `local_units` too."""
            start, stop, _ = index[0].indices(shape[0])
            begin = self.local_units.index(start // rows) * rows
            return value[begin : begin + stop - start][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, field_sharding(name, shape, self._mesh), read)
