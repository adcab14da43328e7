"""The result of a format's reader before `volumes` reorients it."""

from __future__ import annotations

import dataclasses

import numpy as np

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, eq=False)
class StoredVolume:
    """A decoded volume in the orientation of its file.

    Attributes:
      values: [I, J, K] numbers in file order, rescaled to `units`.
      affine: [4, 4] float64, index (i, j, k) to RAS millimetres.
      valid: [I, J, K] bool, False for padding instead of a measurement; None: all valid. Values that are not
        finite may be left valid.
      modality, body_part, units, window, notes: as in `volumes.Volume`.
    """

    values: np.ndarray
    affine: np.ndarray
    valid: np.ndarray | None = None
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    units: str = UNKNOWN
    window: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
