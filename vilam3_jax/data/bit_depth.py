"""Conversion of images with 10 to 32-bit or float samples to 8 bits.

The full scale of grey samples is unreliable: 12-bit radiographs are stored in 16-bit files, and one burnt-in
marker may hold 65535. Grey is therefore stretched between the 0.5 and 99.5 percentiles of its valid pixels.
In colour, stretching each channel would change hues, so all channels are divided by one full scale: a 16-bit
photo equals its 8-bit version.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from vilam3_jax.data.intensity import (
    as_stored_values,
    display_limits,
    percentile_limits,
    usable_values,
    window_to_uint8,
)
from vilam3_jax.errors import UserError

_FULL_SCALES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # 8, 10, 12, 14 and 16 bits
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def to_eight_bits(
    values: np.ndarray, valid: np.ndarray | None = None, *, bits: int, notes: list[str]
) -> np.ndarray:
    """Converts samples to 8 bits.

    Args:
      values: [H, W, C] unsigned, signed or float samples; C is 1 (grey) or 3 (RGB).
      valid: [H, W] bool, False where nothing is visible; None: everywhere.
      bits: bits per sample in the file. Unsigned samples of up to 8 bits use their full scale; all others
        follow the rules of this module. Three equal channels are grey.
      notes: gets a sentence if colours were divided by less than the full scale of `bits`.

    Returns:
      [H, W] or [H, W, 3] uint8.

    Raises:
      UserError: no valid pixel is finite.
    """
    if values.dtype.kind in "ub" and bits <= 8:
        eight = values.astype(np.uint8)
        if bits < 8:
            eight = (eight.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)
        return eight[..., 0] if eight.shape[-1] == 1 else eight
    if values.dtype.kind == "f":
        if values.dtype.itemsize > 4:
            values = np.where(np.isfinite(values) & (np.abs(values) > _MAX_FLOAT32), np.nan, values)
        values = values.astype(np.float32)
    grey = values[..., 0]
    if values.shape[-1] == 1 or all(np.array_equal(grey, values[..., i], equal_nan=True) for i in (1, 2)):
        return _stretch(grey, valid)
    return _divide(values, valid, bits, notes)


def visible_mask(alpha: np.ndarray | None) -> np.ndarray | None:
    """Mask of the pixels that `alpha` leaves visible, bool; None if that is all or none of them."""
    return None if alpha is None or alpha.all() or not alpha.any() else alpha > 0


def with_alpha(eight: np.ndarray, alpha: np.ndarray | None) -> Image.Image:
    """Combines pixels, [H, W] or [H, W, 3] uint8, and alpha, [H, W] in 0 to 1: "L", "RGB", "LA" or "RGBA"."""
    image = Image.fromarray(eight)
    if alpha is not None:
        image.putalpha(Image.fromarray(np.rint(np.clip(alpha, 0, 1) * 255).astype(np.uint8)))
    return image


def _stretch(grey: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    stored = as_stored_values(grey, valid)
    if stored is None:
        raise UserError("image without any finite pixel; export it again")
    low, high = display_limits(stored, usable_values(grey, valid))
    if low == high:
        return _divide(stored, None, 0, [])
    return window_to_uint8(stored, None, (low, high))


def _divide(values: np.ndarray, valid: np.ndarray | None, bits: int, notes: list[str]) -> np.ndarray:
    """Divides by the smallest full scale that holds nearly all values; floats by 1 or by that percentile."""
    usable = values if valid is None else values[valid]
    usable = usable[np.isfinite(usable)]
    if not usable.size:
        raise UserError("image without any finite pixel; export it again")
    top = percentile_limits(usable)[1]
    top = top if top > 0 else float(usable.max())
    if values.dtype.kind == "f":
        full = max(1.0, top)
    else:
        full = next((scale for scale in _FULL_SCALES if top <= scale), float(np.iinfo(values.dtype).max))
        if full < 2**bits - 1:
            notes.append(
                f"colours of {bits} bits with values up to {top:.0f} only; {full:.0f} is used as full scale"
            )
    share = np.clip(np.nan_to_num(values.astype(np.float32)) * np.float32(255 / full), 0, 255)
    return np.rint(share).astype(np.uint8)
