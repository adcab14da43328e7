"""From an 8-bit film to a network's input."""

from __future__ import annotations

import numpy as np
import torch

# Grey level to network units, -1024..1024, in the order of operations of torchxrayvision's `normalize`.
_UNITS = (2 * (np.arange(256, dtype=np.float32) / 255) - 1.0) * 1024


def centre_square(image: np.ndarray) -> torch.Tensor:
    """Crops the first channel to its central square and scales it.

    Args:
      image: uint8 [H, W, C].

    Returns:
      float32 [1, S, S] in -1024..1024, S = min(H, W).
    """
    height, width = image.shape[:2]
    side = min(height, width)
    # The halves are rounded down one by one, as torchxrayvision's `XRayCenterCrop` does.
    top, left = height // 2 - side // 2, width // 2 - side // 2
    return torch.from_numpy(_UNITS[image[top : top + side, left : left + side, 0]])[None]


def resize(square: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes as torchxrayvision 1.2.4 does, with which VILA-M3's training texts were made.

    Bilinear, pixel centres at halves, no antialiasing. Later releases (1.5.7 for one) antialias, and give
    other probabilities for films larger than the network's input.

    Args:
      square: float32 [1, S, S].
      side: pixels of the result.

    Returns:
      float32 [1, side, side].
    """
    if square.shape[-1] == side:
        return square
    size = (side, side)
    return torch.nn.functional.interpolate(square[None], size, mode="bilinear", antialias=False)[0]
