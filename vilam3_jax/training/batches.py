"""Which part of the global batch this process loads, and how its arrays become those of the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vilam3_jax.config import ConfigDict
from vilam3_jax.data.batch_layout import global_units
from vilam3_jax.training import mesh as mesh_lib


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
        unit = jax.ShapeDtypeStruct((self._units,), np.int32)
        sharding = mesh_lib.batch_shardings({"images": unit}, mesh)["images"]
        parts = [index[0] for index in sharding.addressable_devices_indices_map(unit.shape).values() if index]
        self.held = sorted({number for part in parts for number in range(*part.indices(self._units))})

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes global arrays of what this process loaded.

        Args:
          batch: arrays whose leading axis is that of the groups held, or a multiple of it.
        """
        rows = {name: value.shape[0] // len(self.held) for name, value in batch.items()}
        shapes = {
            name: jax.ShapeDtypeStruct((self._units * rows[name], *value.shape[1:]), value.dtype)
            for name, value in batch.items()
        }
        placed = mesh_lib.batch_shardings(shapes, self._mesh)
        return {
            name: jax.make_array_from_callback(
                shapes[name].shape, placed[name], self._reader(value, rows[name])
            )
            for name, value in batch.items()
        }

    def _reader(self, value: np.ndarray, rows: int) -> Any:
        """Gives a device its part of a global array; a device's groups follow each other also in `held`."""
        first = {number: place for place, number in enumerate(self.held)}

        def read(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._units * rows)
            begin = first[start // rows] * rows
            return value[begin : begin + stop - start][(slice(None), *index[1:])]

        return read
