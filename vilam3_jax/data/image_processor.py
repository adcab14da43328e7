"""From a picture to the inputs of the vision tower, as `config.model.image_aspect_ratio` says."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vilam3_jax.config import image_layout
from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.data.images import pad_to_square, resize, resize_to

Grid = tuple[int, int]  # rows, columns

# Of 'pad': the towers' mean pixel, cut off to whole numbers, as VILA fills the square.
_BACKGROUND = {"siglip": (127, 127, 127), "intern_vit": (123, 116, 103)}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """One model's way of preparing pictures; made by `image_processor`.

    A picture is kept as `ImageReader(processor.kept_size)` gives it, experts draw on that, `inputs` makes of
    it what the model takes, and `expand` makes room for that in the text.

    Attributes:
      mode: one of `config.IMAGE_MODES`.
      size: S, side of an input in pixels.
      background: RGB around a picture that is no square ('pad').
      max_tiles: most tiles of a picture ('dynamic').
    """

    mode: str
    size: int
    background: tuple[int, int, int] = (127, 127, 127)
    max_tiles: int = 1

    @property
    def max_inputs(self) -> int:
        """Most inputs of one picture."""
        return _count((1, self.max_tiles))

    @property
    def kept_size(self) -> int | None:
        """Side to which a picture is scaled at once; None where its own shape still matters."""
        return self.size if self.mode == "resize" else None

    def grid(self, picture: np.ndarray) -> Grid:
        """The tiles of a picture: of all grids with at most `max_tiles`, the one nearest in shape.

        Among grids of one shape the larger is taken if the picture has more than half its pixels (the rule
        of InternVL and NVILA).

        Args:
          picture: uint8 [H, W, 3].
        """
        height, width = picture.shape[:2]
        best, best_distance = (1, 1), float("inf")
        for rows, columns in _grids(self.max_tiles):
            distance = abs(width / height - columns / rows)
            large = width * height > 0.5 * self.size**2 * rows * columns
            if distance < best_distance or (distance == best_distance and large):
                best, best_distance = (rows, columns), distance
        return best

    def inputs(self, picture: np.ndarray, grid: Grid | None = None) -> tuple[np.ndarray, ...]:
        """Uint8 [H, W, 3] -> uint8 [S, S, 3] each; tiles row by row, then the whole picture in small.

        Args:
          picture: of any size.
          grid: cuts it in another grid than its own, for a picture that takes the place of another.
        """
        if self.mode == "pad":
            picture = pad_to_square(picture, self.background)
        rows, columns = self.grid(picture) if grid is None else grid
        whole = resize(picture, self.size)
        if rows * columns == 1:
            return (whole,)
        return (*_cut(picture, rows, columns, self.size), whole)

    def expand(self, turns: Sequence[Turn], grids: Sequence[Grid]) -> list[Turn]:
        """Turns with one marker for each input of a picture, a line each; pictures of one input keep theirs.

        Args:
          turns: with one `<image>` for each picture.
          grids: of the pictures, in order.

        Raises:
          ValueError: the numbers of markers and pictures differ.
        """
        waiting = iter(grids)
        out = []
        for turn in turns:
            pieces = re.split(f"({IMAGE_MARKER}\n?)", turn.text)
            for place in range(1, len(pieces), 2):
                grid = next(waiting, None)
                if grid is None:
                    raise ValueError(f"more markers than the {len(grids)} pictures")
                if _count(grid) > 1:
                    pieces[place] = f"{IMAGE_MARKER}\n" * _count(grid)
            out.append(dataclasses.replace(turn, text="".join(pieces)))
        if next(waiting, None) is not None:
            raise ValueError(f"fewer markers than the {len(grids)} pictures")
        return out


def _count(grid: Grid) -> int:
    """Inputs of a picture: its tiles, and itself where there are several."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if tiles > 1 else 1


@functools.cache
def _grids(most: int) -> tuple[Grid, ...]:
    """All (rows, columns) of at most `most` tiles, from few to many."""
    every = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    return tuple(sorted(every, key=lambda grid: (grid[0] * grid[1], grid[1])))


def _cut(picture: np.ndarray, rows: int, columns: int, size: int) -> list[np.ndarray]:
    """Scales to rows x columns tiles of `size` pixels; tiles row by row."""
    scaled = resize_to(picture, (rows * size, columns * size))
    return [
        np.ascontiguousarray(scaled[row : row + size, column : column + size])
        for row in range(0, rows * size, size)
        for column in range(0, columns * size, size)
    ]


def image_processor(model: Any, *, pairs: bool = False) -> ImageProcessor:
    """The image processor of a `config.model`.

    Args:
      model: the section.
      pairs: for contrastive training, where a picture is one input of the tower's own size.

    Raises:
      UserError: see `image_layout`.
    """
    layout = image_layout(model)
    background = _BACKGROUND[model.vision_tower.type]
    if pairs:
        return ImageProcessor("pad" if layout.mode == "pad" else "resize", layout.tile_size, background)
    return ImageProcessor(layout.mode, layout.input_size, background, layout.max_tiles)
