"""Features of one image at several scales, each encoded in tiles (S2, arXiv:2403.13043).

Interpolation follows PyTorch's bicubic kernel and 'area' mode, with which VILA's weights were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vilam3_jax.sharding.logical_axes import shard

_BICUBIC = -0.75  # coefficient of PyTorch's cubic convolution; jax.image.resize uses -0.5


def s2_features(
    encode: Callable[[jax.Array], jax.Array], images: jax.Array, size: int, scales: Sequence[int]
) -> jax.Array:
    """Encodes images at several scales and concatenates the features along the channels.

    Args:
      encode: vision tower, float32 [N, S, S, 3] from 0 to 255 -> [N, g * g, C].
      images: uint8 [N, L, L, 3]; L is the last scale.
      size: side of a tile, S.
      scales: side of the image at each scale, increasing multiples of S that start at S.

    Returns:
      [N, g * g, C * len(scales)] in the dtype of the tower.
    """
    count = len(images)
    sides = [scale // size for scale in scales]
    pixels = images.astype(jnp.float32)
    tiles = jnp.concatenate([split(resize_bicubic(pixels, side * size), side) for side in sides], axis=1)
    tiles = shard(tiles, "batch", None, None, None, None)
    # The tiles of all scales form one batch, so that the tower's weights are read once.
    features = encode(tiles.reshape(-1, *tiles.shape[2:]))
    grid = round(features.shape[1] ** 0.5)
    features = features.reshape(count, tiles.shape[1], grid, grid, -1)
    maps = []
    for index, side in enumerate(sides):
        first = sum(k * k for k in sides[:index])
        merged = merge(features[:, first : first + side * side], side)
        maps.append(resize_area(merged, (grid, grid)))
    joined = jnp.concatenate(maps, axis=-1)
    return shard(joined.reshape(count, grid * grid, -1), "batch", None, None)


def tile_features(features: jax.Array, tiles: jax.Array, sides: Sequence[int]) -> jax.Array:
    """Concatenates each tile's features with those of lower scales at its position (NVILA's dynamic S2).

    Equivalent to merging the tiles of every scale, resizing to the last scale ('area') and splitting into
    tiles, but with shapes that do not depend on the grids.

    Args:
      features: [G, M, g, g, C] from the tower; the tiles of an image are consecutive, lower scales first.
      tiles: int32 [G, M, 5]: first slot of the image, then rows, row, columns and column in the grid of the
        last scale. An image of one tile has no lower scales; its own features replace them.
      sides: tiles along a side of each scale, increasing from 1; the last entry is not used.

    Returns:
      [G, M, g * g, C * len(sides)]; slots of lower scales have arbitrary values.
    """
    groups, slots, grid = features.shape[:3]
    first_slot, rows, row, columns, column = jnp.moveaxis(tiles, -1, 0)
    alone = (rows * columns == 1)[..., None, None, None]
    maps, first = [], 0
    for side in sides[:-1]:
        wanted = first_slot[..., None] + first + jnp.arange(side * side)
        first += side * side
        index = jnp.minimum(wanted, slots - 1).reshape(groups, -1, 1, 1, 1)
        lower = jnp.take_along_axis(features, index, axis=1)
        lower = merge(lower.reshape(groups * slots, side * side, *features.shape[2:]), side)
        lower = shard(lower, "batch", None, None, None)
        down = _area_rows(side, grid, rows, row).reshape(-1, grid, side * grid)
        across = _area_rows(side, grid, columns, column).reshape(-1, grid, side * grid)
        lower = _separable(lower.astype(jnp.float32), down, across)
        lower = lower.reshape(features.shape).astype(features.dtype)
        maps.append(jnp.where(alone, features, lower))
    joined = jnp.concatenate([*maps, features], axis=-1)
    return shard(joined.reshape(groups, slots, grid * grid, -1), "batch", None, None, None)


def _area_rows(side: int, grid: int, count: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `area_weights(side * grid, count * grid)` for tile `index` of `count`.

    `count` and `index` are int [...]; the result is float32 [..., grid, side * grid].
    """
    new = index[..., None] * grid + jnp.arange(grid)
    first = new * side // count[..., None]
    last = -(-(new + 1) * side // count[..., None])
    old = jnp.arange(side * grid)
    inside = (old >= first[..., None]) & (old < last[..., None])
    return inside / (last - first)[..., None].astype(jnp.float32)


def split(x: jax.Array, side: int) -> jax.Array:
    """[N, k*S, k*S, C] -> [N, k*k, S, S, C], tiles in row-major order; k is `side`."""
    count, tile, channels = x.shape[0], x.shape[1] // side, x.shape[3]
    x = x.reshape(count, side, tile, side, tile, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, side * side, tile, tile, channels)


def merge(x: jax.Array, side: int) -> jax.Array:
    """The inverse of `split`: [N, k*k, S, S, C] -> [N, k*S, k*S, C]."""
    count, _, tile, _, channels = x.shape
    x = x.reshape(count, side, side, tile, tile, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, side * tile, side * tile, channels)


def resize_bicubic(x: jax.Array, size: int) -> jax.Array:
    """Float32 [N, L, L, C] -> [N, size, size, C], without antialiasing or aligned corners."""
    if x.shape[1] == size:
        return x
    weights = jnp.asarray(_bicubic_weights(x.shape[1], size))
    return _separable(x, weights, weights)


def resize_area(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[N, H, W, C] -> [N, *shape, C]: means over the pixels that each new one covers, in float32."""
    if x.shape[1:3] == shape:
        return x
    weights = (jnp.asarray(area_weights(old, new)) for old, new in zip(x.shape[1:3], shape, strict=True))
    return _separable(x.astype(jnp.float32), *weights).astype(x.dtype)


def _separable(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Resizes [N, H, W, C] by weights [p, H] and [q, W], or [N, p, H] and [N, q, W]."""
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("...ph,...hwc->...pwc", rows, x, precision=exact)
    return jnp.einsum("...qw,...pwc->...pqc", columns, x, precision=exact)


def _bicubic_weights(old: int, new: int) -> np.ndarray:
    """Float32 [new, old]; samples beyond the border take its value."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(place).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(place - (left + tap))
        near = (_BICUBIC + 2) * distance**3 - (_BICUBIC + 3) * distance**2 + 1
        far = _BICUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        source = np.clip(left + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), source), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


def area_weights(old: int, new: int) -> np.ndarray:
    """Float32 [new, old]: new pixel i is the mean of all old pixels that it overlaps."""
    index, pixels = np.arange(new)[:, None], np.arange(old)
    first, last = index * old // new, -(-(index + 1) * old // new)
    return (((pixels >= first) & (pixels < last)) / (last - first)).astype(np.float32)
