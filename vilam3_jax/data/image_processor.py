"""From a picture to the inputs of the vision tower, as `config.model.image_aspect_ratio` says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vilam3_jax.data.images import pad_to_square, resize
from vilam3_jax.errors import UserError

MODES = ("resize", "pad")
# Of 'pad': the towers' mean pixel, cut off to whole numbers, as VILA fills the square.
_BACKGROUND = {"siglip": (127, 127, 127), "intern_vit": (123, 116, 103)}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """One model's way of preparing pictures; made by `image_processor`.

    A picture is kept as `ImageReader(processor.kept_size)` gives it, experts draw on that, and `inputs` makes
    of it what the model takes.

    Attributes:
      mode: one of `MODES`.
      size: S, side of an input in pixels.
      background: RGB around a picture that is no square ('pad').
    """

    mode: str
    size: int
    background: tuple[int, int, int] = (127, 127, 127)

    @property
    def kept_size(self) -> int | None:
        """Side to which a picture is scaled at once; None where its own shape still matters."""
        return self.size if self.mode == "resize" else None

    def inputs(self, picture: np.ndarray) -> tuple[np.ndarray, ...]:
        """Uint8 [H, W, 3] -> uint8 [S, S, 3] each."""
        if self.mode == "pad":
            picture = pad_to_square(picture, self.background)
        return (resize(picture, self.size),)


def image_processor(model: Any) -> ImageProcessor:
    """The image processor of a `config.model`.

    Raises:
      UserError: `image_aspect_ratio` is unknown.
    """
    mode = model.get("image_aspect_ratio", "resize")
    if mode not in MODES:
        raise UserError(f"config model.image_aspect_ratio={mode!r}: use one of {', '.join(MODES)}")
    return ImageProcessor(mode, int(model.image_size), _BACKGROUND[model.vision_tower.type])
