"""Which part of the global batch this process loads, and how its arrays become those of the mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vilam3_jax.config import ConfigDict
from vilam3_jax.data.batch_sizes import global_units
from vilam3_jax.data.batches import AnyBatch, arrays
from vilam3_jax.sharding import mesh as mesh_lib


class Placement:
    """The part of every global batch that the devices of this process hold.

    Where `tensor` or `context` runs across processes, several of them hold, and load, the same part.

    Attributes:
      held: numbers of its groups ('contrastive': pairs), rising; what `build_loader(held=)` takes.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh) -> None:
        """Looks the part up.

        Raises:
          UserError: the batch does not divide over the mesh.
        """
        self._units = global_units(config)
        self._mesh = mesh
        shape = (self._units,)
        sharding = mesh_lib.batch_sharding("images", shape, mesh)
        parts = [index[0] for index in sharding.addressable_devices_indices_map(shape).values() if index]
        self.held = sorted({number for part in parts for number in range(*part.indices(self._units))})

    def put(self, batch: AnyBatch) -> AnyBatch:
        """Makes global arrays of what this process loaded.

        Args:
          batch: NumPy arrays of the groups, or pairs, held.

        Returns:
          The global batch, of `jax.Array`s.
        """
        return type(batch)(**{name: self._placed(name, value) for name, value in arrays(batch).items()})

    def _placed(self, name: str, value: np.ndarray) -> jax.Array:
        rows = value.shape[0] // len(self.held)
        shape = (self._units * rows, *value.shape[1:])
        sharding = mesh_lib.batch_sharding(name, shape, self._mesh)
        return jax.make_array_from_callback(shape, sharding, self._reader(value, rows))

    def _reader(self, value: np.ndarray, rows: int) -> Any:
        """Gives a device its part of a global array; a device's groups follow each other also in `held`."""
        first = {number: place for place, number in enumerate(self.held)}

        def read(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._units * rows)
            begin = first[start // rows] * rows
            return value[begin : begin + stop - start][(slice(None), *index[1:])]

        return read
