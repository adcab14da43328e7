"""Conversion of an 8-bit film to the input of a network."""

from __future__ import annotations

import numpy as np
import torch

# Grey level to network units, -1024..1024, in the order of operations of torchxrayvision's `normalize`.
_UNITS = (2 * (np.arange(256, dtype=np.float32) / 255) - 1.0) * 1024


def centre_square(image: np.ndarray) -> torch.Tensor:
    """Crops the first channel of uint8 [H, W, C] to its central square; float32 [1, S, S] in -1024..1024."""
    height, width = image.shape[:2]
    side = min(height, width)
    # Both halves are rounded down, as in torchxrayvision's `XRayCenterCrop`.
    top, left = height // 2 - side // 2, width // 2 - side // 2
    return torch.from_numpy(_UNITS[image[top : top + side, left : left + side, 0]])[None]


def resize(square: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes float32 [1, S, S] as torchxrayvision 1.2.4, the release behind VILA-M3's training texts.

    Bilinear, half-pixel centres, no antialiasing. Later releases (such as 1.5.7) antialias, and return other
    probabilities for films larger than the network's input.
    """
    if square.shape[-1] == side:
        return square
    size = (side, side)
    return torch.nn.functional.interpolate(square[None], size, mode="bilinear", antialias=False)[0]
