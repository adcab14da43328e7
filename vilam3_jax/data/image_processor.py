"""From a picture to the inputs of the vision tower, as `config.model.image_aspect_ratio` says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vilam3_jax.config import image_layout
from vilam3_jax.data.images import pad_to_square, resize

# Of 'pad': the towers' mean pixel, cut off to whole numbers, as VILA fills the square.
_BACKGROUND = {"siglip": (127, 127, 127), "intern_vit": (123, 116, 103)}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """One model's way of preparing pictures; made by `image_processor`.

    A picture is kept as `ImageReader(processor.kept_size)` gives it, experts draw on that, and `inputs` makes
    of it what the model takes.

    Attributes:
      mode: one of `config.IMAGE_MODES`.
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


def image_processor(model: Any, *, pairs: bool = False) -> ImageProcessor:
    """The image processor of a `config.model`.

    Args:
      model: the section.
      pairs: for contrastive training, where an image is one input of the tower's own size.

    Raises:
      UserError: see `image_layout`.
    """
    layout = image_layout(model)
    size = layout.tile_size if pairs else layout.input_size
    return ImageProcessor(layout.mode, size, _BACKGROUND[model.vision_tower.type])
