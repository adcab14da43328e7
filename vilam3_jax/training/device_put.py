"""The part of the global batch that a process loads, and its transfer to the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vilam3_jax.data.batches import AnyBatch, map_fields
from vilam3_jax.training.program import field_sharding


class DevicePut:
    """Makes global arrays from the units that this process loads.

    If `tensor` or `context` spans processes, several of them load the same units.

    Attributes:
      local_units: numbers of the units on the devices of this process, ascending, for `build_loader`.
    """

    def __init__(self, units: int, mesh: Mesh) -> None:
        """Finds the local units.

        Args:
          units: of the global batch.
          mesh: of the run.

        Raises:
          UserError: the batch is not divisible over the mesh.
        """
        self._units, self._mesh = units, mesh
        sharding = field_sharding("images", (units,), mesh)
        indices = sharding.addressable_devices_indices_map((units,)).values()
        parts = [index[0] for index in indices if index]
        self.local_units = sorted({number for part in parts for number in range(*part.indices(units))})

    def __call__(self, batch: AnyBatch) -> AnyBatch:
        """Transfers a batch.

        Args:
          batch: NumPy arrays of the local units.

        Returns:
          The global batch, of `jax.Array`s.
        """
        return map_fields(self._put, batch)

    def _put(self, name: str, value: np.ndarray) -> jax.Array:
        rows = value.shape[0] // len(self.local_units)
        shape = (self._units * rows, *value.shape[1:])
        sharding = field_sharding(name, shape, self._mesh)
        return jax.make_array_from_callback(shape, sharding, self._reader(value, rows))

    def _reader(self, value: np.ndarray, rows: int) -> Callable[[Any], np.ndarray]:
        """Returns a device's part of a global array; its units are contiguous in `local_units` too."""
        first = {number: place for place, number in enumerate(self.local_units)}

        def read(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._units * rows)
            begin = first[start // rows] * rows
            return value[begin : begin + stop - start][(slice(None), *index[1:])]

        return read
