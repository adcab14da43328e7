"""From an image to the inputs of the vision tower, as set by `config.model.image_aspect_ratio`."""

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
    """Turns images into inputs of a model; made by `image_processor`.

    An `ImageReader` reads an image by `kept_size` and `preprocessing`, and experts draw on it. `inputs` makes
    the inputs of the tower; `expand` and `merge` adapt the text to their number.
    """

    mode: str  # one of `image_layout.IMAGE_MODES`
    size: int  # S, side of an input in pixels
    background: tuple[int, int, int] = (127, 127, 127)  # RGB of the padding of images that are not square
    max_tiles: int = 1  # maximum tiles of an image ('dynamic', 'dynamic_s2')
    # Tiles along a side of each scale ('dynamic_s2'); a grid has at least the tiles of the last scale.
    sides: tuple[int, ...] = ()
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING  # from volumes to images, the first step

    @property
    def max_inputs(self) -> int:
        """Maximum inputs of an image."""
        return self._count((1, self.max_tiles))

    @property
    def max_markers(self) -> int:
        """Maximum markers of an image in the text."""
        return self._markers((1, self.max_tiles))

    def _count(self, grid: Grid) -> int:
        """Inputs of an image: its tiles and, if there are several, its thumbnail or lower scales."""
        tiles = grid[0] * grid[1]
        lower = sum(side * side for side in self.sides[:-1]) if self.sides else 1
        return 1 if tiles == 1 else tiles + lower

    def _markers(self, grid: Grid) -> int:
        return grid[0] * grid[1] if self.sides else self._count(grid)

    @property
    def kept_size(self) -> int | None:
        """Side to which an image is resized when read; None if later steps depend on its shape."""
        return self.size if self.mode == "resize" else None

    def grid(self, image: np.ndarray) -> Grid:
        """The tile grid of an image, uint8 [H, W, 3]; see `grid_of`."""
        return self.grid_of(image.shape[:2])

    def grid_of(self, shape: tuple[int, int]) -> Grid:
        """The tile grid of an image of shape (H, W), the allowed grid with the nearest aspect ratio.

        Of grids with equal aspect ratio, the larger is taken if the image has more than half its pixels, as
        in InternVL and NVILA.
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

    def inputs(self, image: np.ndarray, grid: Grid | None = None) -> tuple[np.ndarray, ...]:
        """Uint8 [H, W, 3] -> uint8 [S, S, 3] each.

        Tiles are in row-major order. 'dynamic' appends a thumbnail; 'dynamic_s2' puts the tiles of the lower
        scales first. An image that replaces another one is cut by the `grid` of that one.
        """
        if self.mode == "pad":
            image = pad_to_square(image, self.background)
        rows, columns = self.grid(image) if grid is None else grid
        thumbnail = resize(image, self.size)
        if rows * columns == 1:
            return (thumbnail,)
        tiles = _cut(image, rows, columns, self.size)
        if not self.sides:
            return (*tiles, thumbnail)
        lower = (tile for side in self.sides[:-1] for tile in _cut(image, side, side, self.size))
        return (*lower, *tiles)

    def expand(self, turns: Sequence[Turn], grids: Sequence[Grid]) -> list[Turn]:
        """Repeats the marker of every image for its tiles.

        'dynamic' has a marker and a line per input. 'dynamic_s2' has adjacent markers for the tiles of the
        last scale, so that the tokens of an image are contiguous.

        Args:
          turns: with one `<image>` per image.
          grids: grids of the images, in order.

        Raises:
          ValueError: the numbers of markers and images differ.
        """
        remaining = iter(grids)
        out = []
        for turn in turns:
            pieces = re.split(f"({IMAGE_MARKER}\n?)", turn.text)
            for place in range(1, len(pieces), 2):
                grid = next(remaining, None)
                if grid is None:
                    raise ValueError(f"more markers than the {len(grids)} images")
                if self._count(grid) == 1:
                    continue
                if self.sides:
                    pieces[place] = IMAGE_MARKER * (self._markers(grid) - 1) + pieces[place]
                else:
                    pieces[place] = f"{IMAGE_MARKER}\n" * self._count(grid)
            out.append(dataclasses.replace(turn, text="".join(pieces)))
        if next(remaining, None) is not None:
            raise ValueError(f"fewer markers than the {len(grids)} images")
        return out

    def merge(self, encoded: Encoded, grids: Sequence[Grid], tokens_per_input: int) -> Encoded:
        """Reorders the tokens of tiles to the row-major order of the whole image ('dynamic_s2').

        Args:
          encoded: encoding of turns from `expand`.
          grids: as there.
          tokens_per_input: T, a square number; the tokens of an input are in row-major order.

        Returns:
          `encoded` with `image_of_token` counting inputs; those of lower scales have no token. Text that text
          rules add after every marker is kept only after the last one of an image.
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
        """The position of each input in its image ('dynamic_s2'), or None.

        Returns:
          int32 [inputs, 5]: first input of the image; rows, row, columns, column of the grid of the last
          scale, and 1, 0, 1, 0 for tiles of lower scales.
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
    """All (rows, columns) of `least` to `most` tiles, in ascending order of tiles."""
    every = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    allowed = [grid for grid in every if grid[0] * grid[1] >= least]
    return tuple(sorted(allowed, key=lambda grid: (grid[0] * grid[1], grid[1])))


def _cut(image: np.ndarray, rows: int, columns: int, size: int) -> list[np.ndarray]:
    """Resizes and cuts into rows x columns tiles of `size` pixels, in row-major order."""
    scaled = resize(image, (rows * size, columns * size))
    return [
        np.ascontiguousarray(scaled[row : row + size, column : column + size])
        for row in range(0, rows * size, size)
        for column in range(0, columns * size, size)
    ]


def image_processor(model: Any, *, pairs: bool = False) -> ImageProcessor:
    """The image processor of a `config.model`.

    Args:
      model: the section.
      pairs: for contrastive training, where an image is one input of the tower's size.

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
