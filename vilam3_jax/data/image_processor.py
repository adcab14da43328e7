"""From a picture to the inputs of the vision tower, as `config.model.image_aspect_ratio` says."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.data.image_layout import image_layout
from vilam3_jax.data.images import pad_to_square, resize
from vilam3_jax.data.packing import NO_GRID
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from vilam3_jax.data.templates import Encoded

Grid = tuple[int, int]  # rows, columns


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """One model's way of preparing pictures; made by `image_processor`.

    An `ImageReader` reads a picture by `kept_size` and `preprocessing`, experts draw on that, `inputs` makes
    of it what the model takes, and `expand` and `merge` make room for that in the text.

    Attributes:
      mode: one of `config.IMAGE_MODES`.
      size: S, side of an input in pixels.
      background: RGB around a picture that is no square ('pad').
      max_tiles: most tiles of a picture ('dynamic', 'dynamic_s2').
      sides: tiles along a side of each scale ('dynamic_s2'); the last says the fewest tiles of a grid.
      preprocessing: how scans become pictures before any of this.
    """

    mode: str
    size: int
    background: tuple[int, int, int] = (127, 127, 127)
    max_tiles: int = 1
    sides: tuple[int, ...] = ()
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING

    @property
    def max_inputs(self) -> int:
        """Most inputs of one picture."""
        return self._count((1, self.max_tiles))

    @property
    def max_markers(self) -> int:
        """Most inputs of one picture that stand in the text."""
        return self._markers((1, self.max_tiles))

    def _count(self, grid: Grid) -> int:
        """Inputs of a picture: its tiles and, where there are several, the whole of it in small."""
        tiles = grid[0] * grid[1]
        lower = sum(side * side for side in self.sides[:-1]) if self.sides else 1
        return 1 if tiles == 1 else tiles + lower

    def _markers(self, grid: Grid) -> int:
        return grid[0] * grid[1] if self.sides else self._count(grid)

    @property
    def kept_size(self) -> int | None:
        """Side to which a picture is scaled at once; None where its own shape still matters."""
        return self.size if self.mode == "resize" else None

    def grid(self, picture: np.ndarray) -> Grid:
        """The tiles of a picture, uint8 [H, W, 3]; see `grid_of`."""
        return self.grid_of(picture.shape[:2])

    def grid_of(self, shape: tuple[int, int]) -> Grid:
        """The tiles of a picture of shape (H, W): of all grids that are allowed, the one nearest in shape.

        Among grids of one shape the larger is taken if the picture has more than half its pixels (the rule
        of InternVL and NVILA).
        """
        height, width = shape
        best, best_distance = (1, 1), float("inf")
        least = self.sides[-1] ** 2 if self.sides else 1
        for rows, columns in _grids(min(least, self.max_tiles), self.max_tiles):
            distance = abs(width / height - columns / rows)
            large = width * height > 0.5 * self.size**2 * rows * columns
            if distance < best_distance or (distance == best_distance and large):
                best, best_distance = (rows, columns), distance
        return best

    def inputs(self, picture: np.ndarray, grid: Grid | None = None) -> tuple[np.ndarray, ...]:
        """Uint8 [H, W, 3] -> uint8 [S, S, 3] each.

        Tiles run row by row. After those of 'dynamic' comes the whole picture in small; before those of
        'dynamic_s2' come the tiles of the lower scales.

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
        tiles = _cut(picture, rows, columns, self.size)
        if not self.sides:
            return (*tiles, whole)
        lower = (tile for side in self.sides[:-1] for tile in _cut(picture, side, side, self.size))
        return (*lower, *tiles)

    def expand(self, turns: Sequence[Turn], grids: Sequence[Grid]) -> list[Turn]:
        """Turns with as many markers as a picture needs; those of one tile keep theirs.

        In 'dynamic' every input has a marker and a line of its own. In 'dynamic_s2' the tiles of the last
        scale have one each, without anything between, so that the picture's tokens are in one piece.

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
                if self._count(grid) == 1:
                    continue
                if self.sides:
                    pieces[place] = IMAGE_MARKER * (self._markers(grid) - 1) + pieces[place]
                else:
                    pieces[place] = f"{IMAGE_MARKER}\n" * self._count(grid)
            out.append(dataclasses.replace(turn, text="".join(pieces)))
        if next(waiting, None) is not None:
            raise ValueError(f"fewer markers than the {len(grids)} pictures")
        return out

    def merge(self, encoded: Encoded, grids: Sequence[Grid], tokens_per_input: int) -> Encoded:
        """Lets the tokens of a picture's tiles run row by row over the whole picture ('dynamic_s2').

        Args:
          encoded: of turns that `expand` made.
          grids: as there.
          tokens_per_input: T, a square number; an input's tokens run row by row.

        Returns:
          `encoded` with `image_of_token` counting inputs, of which those of lower scales have no token. What
          text rules put after every marker stays only after the last one of a picture.
        """
        if not self.sides:
            return encoded
        side = math.isqrt(tokens_per_input)
        image, offset = encoded.image_of_token.copy(), encoded.visual_offset.copy()
        kept = np.ones(len(encoded), bool)
        marker = first = 0
        for rows, columns in grids:
            tiles = rows * columns
            where = (encoded.image_of_token >= marker) & (encoded.image_of_token < marker + tiles)
            place = np.flatnonzero(where)
            kept[place[0] : place[-1]] = where[place[0] : place[-1]]
            row, column = np.divmod(np.arange(len(place)), columns * side)
            lower = self._count((rows, columns)) - tiles
            image[where] = first + lower + row // side * columns + column // side
            offset[where] = row % side * side + column % side
            marker, first = marker + tiles, first + lower + tiles
        return Encoded(
            encoded.tokens[kept], encoded.loss_mask[kept], image[kept], offset[kept], num_images=first
        )

    def tile_map(self, grids: Sequence[Grid]) -> np.ndarray | None:
        """Where each input belongs ('dynamic_s2'), or None.

        Returns:
          int32 [inputs, 5]: first input of its picture; rows, row, columns, column of the grid of the last
          scale. Tiles of the lower scales say 1, 0, 1, 0.
        """
        if not self.sides:
            return None
        table: list[tuple[int, ...]] = []
        for rows, columns in grids:
            first, lower = len(table), self._count((rows, columns)) - rows * columns
            table += [(first, *NO_GRID)] * lower
            table += [(first, rows, r, columns, c) for r in range(rows) for c in range(columns)]
        return np.asarray(table, np.int32).reshape(-1, 5)


@functools.cache
def _grids(least: int, most: int) -> tuple[Grid, ...]:
    """All (rows, columns) of `least` to `most` tiles, from few to many."""
    every = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    allowed = [grid for grid in every if grid[0] * grid[1] >= least]
    return tuple(sorted(allowed, key=lambda grid: (grid[0] * grid[1], grid[1])))


def _cut(picture: np.ndarray, rows: int, columns: int, size: int) -> list[np.ndarray]:
    """Scales to rows x columns tiles of `size` pixels; tiles row by row."""
    scaled = resize(picture, (rows * size, columns * size))
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
      UserError: see `image_layout` and `Preprocessing`.
    """
    layout = image_layout(model)
    preprocessing = Preprocessing.of(model.get("preprocessing"))
    background = model.vision_tower.background
    if pairs:
        mode = "pad" if layout.mode == "pad" else "resize"
        return ImageProcessor(mode, layout.tile_size, background, preprocessing=preprocessing)
    sides = ()
    if layout.mode == "dynamic_s2":
        sides = tuple(scale // layout.tile_size for scale in layout.scales)
    return ImageProcessor(
        layout.mode, layout.input_size, background, layout.max_tiles, sides, preprocessing=preprocessing
    )
