"""Voxel and pixel values: storage types, display windows, conversion to 8-bit grey."""

from __future__ import annotations

import numpy as np

# (centre, width) in HU. Soft tissue is VILA-M3's window: -150 to 250.
CT_WINDOWS: dict[str, tuple[tuple[float, float], ...]] = {
    "soft_tissue": ((50.0, 400.0),),
    "lung": ((-600.0, 1500.0),),
    "bone": ((400.0, 1800.0),),
    "brain": ((40.0, 80.0),),
    # MedGemma's paper maps -1024..1024, -135..215 and 0..80 HU to red, green and blue. Its maintainers give
    # another wide window (width 2250 at level -100); set `ct_windows` to use that.
    "medgemma": ((0.0, 2048.0), (40.0, 350.0), (40.0, 80.0)),
}
DISPLAY_PERCENTILES = (0.5, 99.5)

_LARGEST = np.finfo(np.float32).max  # larger values would become infinite
_SAMPLED_ABOVE = 1 << 24  # above this size, percentiles use every n-th voxel


def as_stored_values(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray | None:
    """Converts values to the smallest type that holds them, so the type depends only on the values.

    Args:
      values: rescaled numbers of any type and shape.
      valid: bool of the same shape, False for padding; None: all valid.

    Returns:
      int16 or else int32 if all values are whole and fit, else float32. Invalid values, NaN and -inf become
      the smallest valid finite value, +inf the largest, -0 becomes 0; values beyond float32 count as
      infinite. None if no value is valid and finite.
    """
    usable = usable_values(values, valid)
    if usable is not None:
        if not usable.any():
            return None
        low, high = values[usable].min(), values[usable].max()
        filled = np.where(usable, values, low)
        if values.dtype.kind == "f":
            over = values > _LARGEST if valid is None else (values > _LARGEST) & valid
            filled[over] = high
        values = filled
    low, high = values.min(), values.max()
    for target in (np.int16, np.int32):
        if np.iinfo(target).min <= low and high <= np.iinfo(target).max:
            whole = values.astype(target)
            if values.dtype.kind in "iub" or np.array_equal(whole, values):
                return whole
    return values.astype(np.float32) + np.float32(0)


def usable_values(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray | None:
    """Mask of the valid values that are finite in float32, bool of their shape; None if all are."""
    if values.dtype.kind == "f":
        finite = (values <= _LARGEST) & (values >= -_LARGEST)  # NaN is neither
        if not finite.all():
            return finite if valid is None else finite & valid
    return None if valid is None or valid.all() else valid


def percentile_limits(
    values: np.ndarray,
    valid: np.ndarray | None = None,
    percentiles: tuple[float, float] = DISPLAY_PERCENTILES,
) -> tuple[float, float]:
    """Two percentiles of the valid values: a display range that is robust to a few extreme voxels.

    `values` are finite numbers of any shape; `valid` is bool of the same shape, None: all valid.
    """
    flat = values.reshape(-1) if valid is None else values[valid]
    if flat.size > _SAMPLED_ABOVE:
        flat = flat[:: -(-flat.size // _SAMPLED_ABOVE)]
    low, high = np.percentile(flat, percentiles)
    return float(low), float(high)


def display_limits(values: np.ndarray, valid: np.ndarray | None) -> tuple[float, float]:
    """`percentile_limits`, or the full range of the valid values if nearly all are equal."""
    low, high = percentile_limits(values, valid)
    if low < high:
        return low, high
    flat = values if valid is None else values[valid]
    return float(flat.min()), float(flat.max())


def window_to_uint8(
    plane: np.ndarray, window: tuple[float, float] | None, limits: tuple[float, float] | None = None
) -> np.ndarray:
    """Maps values to 8-bit grey, black below the window and white above.

    Args:
      plane: numbers of any shape, usually [H, W].
      window: (centre, width) in the unit of `plane`: (50, 400) shows -150..250.
      limits: (black, white), required if and only if `window` is None: `Volume.limits` of the whole *volume*,
        so that its slices are scaled alike.

    Returns:
      uint8 of the same shape, truncated and not rounded, as in the reference pipeline.

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
    # Divide first: multiplying by 255 / width would map the white end to 254.99.
    share = (plane.astype(np.float64) - low) / (high - low or 1.0)
    return (np.clip(share, 0, 1) * 255).astype(np.uint8)
