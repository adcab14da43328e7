"""VILA: a vision tower, a projector and a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.errors import UserError
from vilam3_jax.models import families
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.models.projector import Projector
from vilam3_jax.models.s2 import s2_features, tile_features
from vilam3_jax.models.siglip import check_images
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard


class Vila(nnx.Module):
    """Vision-language model: images become tokens in the text stream."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        if cfg.vision_tower is None or cfg.projector is None or cfg.llm is None:
            raise UserError("config model: needs vision_tower, projector and llm; name one of configs/models")
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        tower = families.get("vision_tower", cfg.vision_tower.type).module
        llm: Any = families.get("llm", cfg.llm.type).module
        self.layout = cfg.image_layout
        self.vision_tower: Any = tower(cfg.vision_tower, remat=cfg.remat, **kwargs)
        self.projector = Projector(cfg.projector, cfg.projector_width, cfg.llm.hidden_size, **kwargs)
        self.llm = llm(cfg.llm, remat=cfg.remat, **kwargs)

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Uint8 [N, S, S, 3] -> [N, T, D], tokens in the space of text embeddings."""
        layout, tower = self.layout, self.vision_tower
        if layout.mode == "dynamic_s2":
            raise ValueError("'dynamic_s2' encodes the tiles of an image together: use encode_tiles")
        if not layout.scales:
            return self.projector(tower.features(images))
        check_images(images, layout.input_size)
        return self.projector(s2_features(tower.pixel_features, images, layout.tile_size, layout.scales))

    def encode_tiles(self, images: jax.Array, tiles: jax.Array) -> jax.Array:
        """`encode_images` of 'dynamic_s2': uint8 [G, M, S, S, 3], int32 [G, M, 5] -> [G * M, T, D].

        Tiles of lower scales also get tokens, which are not used.
        """
        tower, layout = self.vision_tower, self.layout
        features = _over_all_devices(tower.features, images)
        maps = features.reshape(*images.shape[:2], tower.grid, tower.grid, -1)
        sides = [scale // layout.tile_size for scale in layout.scales]
        joined = tile_features(maps, tiles, sides)
        return self.projector(joined.reshape(-1, *joined.shape[2:]))

    def embed(
        self,
        tokens: jax.Array,
        images: jax.Array | None = None,
        image_valid: jax.Array | None = None,
        visual_index: jax.Array | None = None,
        image_tiles: jax.Array | None = None,
    ) -> jax.Array:
        """Text embeddings with image tokens inserted.

        Args:
          tokens: int [B, L]; ids at image positions are ignored.
          images: uint8 [G, M, S, S, 3]; None, or M = 0, for text only. Rows g*B/G .. (g+1)*B/G - 1 form
            group g.
          image_valid: bool [G, M]; False for empty slots.
          visual_index: int [B, L]: index of the token among the group's M*T image tokens; -1 for text. An
            index beyond M*T gives NaN, so that the error is visible.
          image_tiles: int [G, M, 5], for 'dynamic_s2' only; see `tile_features`.

        Returns:
          [B, L, D].

        Raises:
          ValueError: the rows do not divide into groups, or arguments are missing.
        """
        if images is None or not images.shape[1]:  # data.images_per_group=0
            return self.insert(tokens)
        if image_valid is None or visual_index is None:
            raise ValueError("images need image_valid and visual_index")
        return self.insert(tokens, visual_index, self.visual_tokens(images, image_valid, image_tiles))

    def visual_tokens(
        self, images: jax.Array, image_valid: jax.Array, image_tiles: jax.Array | None = None
    ) -> jax.Array:
        """The image tokens of each group, [G, M*T, D], zero for empty slots; arguments as for `embed`."""
        groups = images.shape[0]
        if (image_tiles is None) == (self.layout.mode == "dynamic_s2"):
            raise ValueError(f"image_tiles and image_aspect_ratio={self.layout.mode!r} contradict each other")
        if image_tiles is None:
            visual = _over_all_devices(self.encode_images, images)
        else:
            visual = self.encode_tiles(images, image_tiles)
        visual = jnp.where(image_valid.reshape(-1, 1, 1), visual, 0)
        return shard(visual.reshape(groups, -1, visual.shape[-1]), "batch", None, "embed")

    def insert(
        self, tokens: jax.Array, visual_index: jax.Array | None = None, visual: jax.Array | None = None
    ) -> jax.Array:
        """Text embeddings [B, L, D], with the image tokens `visual` [G, M*T, D]; see `embed`."""
        text = shard(self.llm.embed(tokens), "batch", "length", "embed")
        if visual_index is None or visual is None:
            return text
        groups, (rows, length) = visual.shape[0], tokens.shape
        if rows % groups:
            raise ValueError(f"{rows} rows do not divide into {groups} groups")
        index = shard(visual_index.reshape(groups, -1, 1), "batch", None, None)
        inserted = jnp.take_along_axis(visual, jnp.maximum(index, 0), axis=1)
        inserted = shard(inserted, "batch", None, "embed").reshape(rows, length, -1)
        return shard(jnp.where(visual_index[..., None] >= 0, inserted, text), "batch", "length", "embed")

    def __call__(self, batch: PackedBatch) -> jax.Array:
        """Hidden states [B, L, D] of a packed batch after the final norm."""
        embedded = self.embed(
            batch.tokens, batch.images, batch.image_valid, batch.visual_index, batch.image_tiles
        )
        return self.llm(embedded, batch.segment_ids, batch.positions)


def _over_all_devices(encode: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """Encodes images [G, M, S, S, 3] -> [G * M, T, D] on all devices, those of `mesh.context` included.

    `encode` maps [N, S, S, 3] to [N, T, D]; N is padded to a multiple of the devices.
    """
    groups, slots = images.shape[:2]
    if logical_axes.axis_size("length") == 1:
        return encode(images.reshape(groups * slots, *images.shape[2:]))
    with logical_axes.batch_over_length():
        devices = logical_axes.axis_size("batch")
        extra = next((n for n in range(devices) if groups * (slots + n) % devices == 0), 0)
        padded = jnp.pad(images, ((0, 0), (0, extra), (0, 0), (0, 0), (0, 0)))
        encoded = encode(shard(padded.reshape(-1, *images.shape[2:]), "batch", None, None, None))
    encoded = shard(encoded.reshape(groups, slots + extra, *encoded.shape[1:]), "batch", None, None, None)
    return encoded[:, :slots].reshape(groups * slots, *encoded.shape[2:])
