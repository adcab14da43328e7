"""How a model takes images: resized, padded, cut into tiles, or encoded at several scales (S2)."""

from __future__ import annotations

import dataclasses
from typing import Any

from vilam3_jax.errors import UserError

IMAGE_MODES = ("resize", "pad", "dynamic", "dynamic_s2")
MAX_SCALE = 8  # times the tower's size
MAX_TILES = MAX_SCALE**2


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """How a model takes images; made by `image_layout`."""

    mode: str  # one of `IMAGE_MODES`
    tile_size: int  # S, side in pixels of an input of the vision tower
    scales: tuple[int, ...] = ()  # sides at which an image is encoded (S2); empty for S alone
    max_tiles: int = 1  # maximum tiles of an image in the dynamic modes, without thumbnail or lower scales

    @property
    def input_size(self) -> int:
        """Side in pixels of the model's inputs."""
        whole = self.scales and self.mode != "dynamic_s2"
        return self.scales[-1] if whole else self.tile_size

    @property
    def feature_maps(self) -> int:
        """Number of feature maps of the tower that are concatenated before the projector."""
        return max(len(self.scales), 1)


def image_layout(model: Any) -> ImageLayout:
    """Reads `image_size`, `image_aspect_ratio`, `s2_scales` and `max_tiles` of a `config.model`.

    Raises `UserError` for an unknown mode, too many tiles, or scales that do not fit the tower or the mode.
    """
    mode, size, scales = model.image_aspect_ratio, int(model.image_size), tuple(model.s2_scales)
    if mode not in IMAGE_MODES:
        raise UserError(f"config model.image_aspect_ratio={mode!r}: use one of {', '.join(IMAGE_MODES)}")
    if scales:
        _check_scales(scales, size)
    if mode not in ("dynamic", "dynamic_s2"):
        return ImageLayout(mode, size, scales)
    if mode == "dynamic_s2" and not scales:
        raise UserError(
            "config model.s2_scales is empty, but image_aspect_ratio='dynamic_s2' needs scales, such as "
            f"({size}, {2 * size}, {3 * size})"
        )
    if mode == "dynamic" and scales:
        raise UserError(
            f"config model.s2_scales={scales}: image_aspect_ratio='dynamic' has no scales; leave them empty"
        )
    tiles = model.max_tiles
    if not isinstance(tiles, int) or not 1 <= tiles <= MAX_TILES:
        raise UserError(f"config model.max_tiles={tiles!r}: must be 1 to {MAX_TILES}")
    least = (scales[-1] // size) ** 2 if scales else 1
    if 1 < tiles < least:
        raise UserError(
            f"config model.max_tiles={tiles}: the last of s2_scales={scales} alone has {least} tiles; set it "
            f"to {least} or more, or to 1 to disable tiles"
        )
    return ImageLayout(mode, size, scales, tiles)


def _check_scales(scales: tuple[int, ...], size: int) -> None:
    whole = all(isinstance(scale, int) and not scale % size for scale in scales)
    rising = sorted(set(scales)) == list(scales)
    if len(scales) < 2 or not whole or not rising or scales[0] != size:
        raise UserError(
            f"config model.s2_scales={scales}: must be two or more increasing multiples of the tower's "
            f"{size} pixels, the first of them {size}, such as ({size}, {2 * size})"
        )
    if scales[-1] > MAX_SCALE * size:
        raise UserError(
            f"config model.s2_scales={scales}: the last is {scales[-1] // size} times the tower's {size} "
            f"pixels, {(scales[-1] // size) ** 2} tiles per image; at most {MAX_SCALE} times is supported"
        )
