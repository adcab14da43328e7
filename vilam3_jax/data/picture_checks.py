"""Checks that every reader of pictures makes."""

from __future__ import annotations

from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Refuses a picture that is empty or has more than `limits.pixels`.

    Raises:
      UserError: names the size.
    """
    if min(width, height) < 1:
        raise UserError(f"image of {width} x {height} pixels; fetch or export it again")
    if width * height > limits.pixels:
        raise UserError(
            f"image of {width} x {height} pixels, more than the limit of {limits.pixels}; scale it down"
        )


def choose_frame(frame: int | None, count: int, name: str, parts: str) -> int:
    """Returns the frame to decode; only a picture of one frame needs no choice.

    Args:
      frame: what was asked for, or None.
      count: how many there are.
      name: of the kind of picture.
      parts: "pages" or "frames".

    Raises:
      UserError: several and none chosen, or outside.
    """
    if frame is None and count > 1:
        raise UserError(f"{name} of {count} {parts}; choose one (0 to {count - 1}) or save it as PNG")
    if frame is not None and not 0 <= frame < count:
        raise UserError(f"{name} has no number {frame} among its {count} {parts}; choose 0 to {count - 1}")
    return frame or 0
