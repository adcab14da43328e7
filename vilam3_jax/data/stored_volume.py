"""What a format's reader hands to `volumes`: voxels as the file orders them, and what the file states."""

from __future__ import annotations

import dataclasses

import numpy as np

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, eq=False)
class StoredVolume:
    """A decoded volume before it is brought into canonical orientation.

    Attributes:
      values: [I, J, K] numbers in the order of the file, rescaled to `units`.
      affine: [4, 4] float64, index (i, j, k) to RAS millimetres.
      valid: [I, J, K] bool, False where the file stores padding instead of a measurement; None: all valid.
        Values that are not finite need not be marked.
      modality: DICOM's code as the file states it (CT, MR, PT, NM, US, ...), or "unknown".
      body_part: as the file states it, upper case, or "unknown".
      units: of `values`: "HU", "SUVbw", "Bq/ml", ..., or "unknown".
      window: the file's own display window (centre, width) in `units`, or None.
      notes: sentences about what was assumed, repaired or skipped; they name no patient.
    """

    values: np.ndarray
    affine: np.ndarray
    valid: np.ndarray | None = None
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    units: str = UNKNOWN
    window: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
