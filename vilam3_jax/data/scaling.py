"""Voxel values: the one rule of their type, and their way to 8-bit grey."""

from __future__ import annotations

import numpy as np

_SAMPLED_ABOVE = 1 << 24  # percentiles of larger volumes are taken from every n-th voxel


def as_stored_values(values: np.ndarray) -> np.ndarray | None:
    """Gives values the type that depends on nothing but the values.

    Args:
      values: numbers of any type and shape, already rescaled.

    Returns:
      int16 if all are whole and fit, else int32 if all are whole and fit, else float32. NaN and -inf are
      replaced by the smallest finite value, +inf by the largest, -0 by 0. None if nothing is finite.
    """
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.any():
            return None
        if not finite.all():
            low, high = values[finite].min(), values[finite].max()
            values = np.nan_to_num(values, nan=low, neginf=low, posinf=high)
    low, high = values.min(), values.max()
    for target in (np.int16, np.int32):
        if np.iinfo(target).min <= low and high <= np.iinfo(target).max:
            whole = values.astype(target)
            if values.dtype.kind in "iub" or np.array_equal(whole, values):
                return whole
    return values.astype(np.float32) + np.float32(0)


def percentile_limits(values: np.ndarray) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles, a display range that a few extreme voxels cannot spoil."""
    flat = values.reshape(-1)
    if flat.size > _SAMPLED_ABOVE:
        flat = flat[:: -(-flat.size // _SAMPLED_ABOVE)]
    low, high = np.percentile(flat, (0.5, 99.5))
    return float(low), float(high)


def window_to_uint8(
    plane: np.ndarray, window: tuple[float, float] | None, limits: tuple[float, float] | None = None
) -> np.ndarray:
    """Maps values to 8-bit grey, black below the window and white above.

    Args:
      plane: numbers of any shape, usually [H, W].
      window: (centre, width) in the unit of `plane`: (50, 400) shows -150..250.
      limits: (black, white), needed if and only if `window` is None: `Volume.limits` of the *volume*, so that
        all its slices are scaled alike.

    Returns:
      uint8 of the same shape; values are cut off, not rounded, as in the reference pipeline.

    Raises:
      ValueError: both or neither of `window` and `limits` given.
    """
    if (window is None) == (limits is None):
        raise ValueError("give either a window or the volume's limits")
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    else:
        assert limits is not None
        low, high = limits
    # Divide first: with a ready factor of 255 / width the white end itself would come out as 254.99.
    share = (plane.astype(np.float64) - low) / max(high - low, 1e-6)
    return (np.clip(share, 0, 1) * 255).astype(np.uint8)
