"""VILA: a vision tower, a projector and a language model; and how models are built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from vilam3_jax.config import ImageLayout, image_layout
from vilam3_jax.errors import UserError
from vilam3_jax.models.contrastive import TwoTower
from vilam3_jax.models.intern_vit import InternViT
from vilam3_jax.models.layers import find_weights
from vilam3_jax.models.llama import Llama
from vilam3_jax.models.projector import Projector, grid_tokens, plan
from vilam3_jax.models.s2 import s2_features, tile_features
from vilam3_jax.models.siglip import SiglipVision, check_images
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard

VISION_TOWERS = {"siglip": SiglipVision, "intern_vit": InternViT}
LLMS = {"llama": Llama}


class Vila(nnx.Module):
    """Vision-language model: images become tokens that stand in the text stream."""

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        tower = _family(VISION_TOWERS, "vision_tower", cfg.vision_tower.type)
        llm = _family(LLMS, "llm", cfg.llm.type)
        self.layout = _layout(cfg)
        self.vision_tower = tower(cfg.vision_tower, remat=cfg.remat, **kwargs)
        self.projector = Projector(cfg.projector, projector_width(cfg), cfg.llm.hidden_size, **kwargs)
        self.llm = llm(cfg.llm, remat=cfg.remat, **kwargs)

    @property
    def num_image_tokens(self) -> int:
        """T: tokens one input occupies in the text stream."""
        return self.projector.num_tokens(self.vision_tower.grid)

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Uint8 [N, S, S, 3] -> [N, T, D], ready to stand among text embeddings."""
        layout, tower = self.layout, self.vision_tower
        if layout.mode == "dynamic_s2":
            raise ValueError("inputs of 'dynamic_s2' belong together: use encode_tiles")
        if not layout.scales:
            return self.projector(tower.features(images))
        check_images(images, layout.input_size)
        return self.projector(s2_features(tower.pixel_features, images, layout.tile_size, layout.scales))

    def encode_tiles(self, images: jax.Array, tiles: jax.Array) -> jax.Array:
        """`encode_images` of 'dynamic_s2': uint8 [G, M, S, S, 3], int32 [G, M, 5] -> [G * M, T, D].

        Tiles of lower scales get tokens, too, which are nobody's.
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
        """Text embeddings with image tokens in their places.

        Args:
          tokens: int [B, L]; what stands under an image token is ignored.
          images: uint8 [G, M, S, S, 3]; None, or M = 0, for text only. Rows g*B/G .. (g+1)*B/G - 1 form
            group g.
          image_valid: bool [G, M]; slots that are False hold nothing.
          visual_index: int [B, L]: which of the group's M*T image tokens stands here; -1 for text. An
            index beyond M*T gives NaN, and so shows itself.
          image_tiles: int [G, M, 5], for 'dynamic_s2' alone; see `tile_features`.

        Returns:
          [B, L, D].

        Raises:
          ValueError: the rows do not divide into groups, or images come without their validity or index.
        """
        text = shard(self.llm.embed(tokens), "batch", "length", "embed")
        if images is None or not images.shape[1]:  # data.images_per_group=0
            return text
        if image_valid is None or visual_index is None:
            raise ValueError("images need image_valid and visual_index")
        groups = images.shape[0]
        rows, length = tokens.shape
        if rows % groups:
            raise ValueError(f"{rows} rows do not divide into {groups} groups")
        if (image_tiles is None) == (self.layout.mode == "dynamic_s2"):
            raise ValueError(f"image_tiles and image_aspect_ratio={self.layout.mode!r} contradict each other")
        if image_tiles is None:
            visual = _over_all_devices(self.encode_images, images)
        else:
            visual = self.encode_tiles(images, image_tiles)
        visual = jnp.where(image_valid.reshape(-1, 1, 1), visual, 0)
        visual = shard(visual.reshape(groups, -1, visual.shape[-1]), "batch", None, "embed")
        index = shard(visual_index.reshape(groups, -1, 1), "batch", None, None)
        placed = jnp.take_along_axis(visual, jnp.maximum(index, 0), axis=1)
        placed = shard(placed, "batch", None, "embed").reshape(rows, length, -1)
        return shard(jnp.where(visual_index[..., None] >= 0, placed, text), "batch", "length", "embed")

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        images: jax.Array | None = None,
        image_valid: jax.Array | None = None,
        visual_index: jax.Array | None = None,
        image_tiles: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, L, D] after the final norm; arguments as in `embed` and `Llama.__call__`."""
        embedded = self.embed(tokens, images, image_valid, visual_index, image_tiles)
        return self.llm(embedded, segment_ids, positions)

    def head_kernel(self) -> jax.Array:
        """[D, V], for the loss."""
        return self.llm.head_kernel()

    def head_stored(self) -> PartitionSpec | None:
        """Where that kernel lies in a sharded step."""
        return self.llm.head_stored()


def _over_all_devices(encode: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """`encode` of each image alone, by the devices that share a row, too (`mesh.context`).

    Args:
      encode: [N, S, S, 3] -> [N, T, D].
      images: [G, M, S, S, 3]; empty ones are added where the devices do not divide them.

    Returns:
      [G * M, T, D].
    """
    groups, slots = images.shape[:2]
    if logical_axes.ways("length") == 1:
        return encode(images.reshape(groups * slots, *images.shape[2:]))
    with logical_axes.whole_rows():
        devices = logical_axes.ways("batch")
        extra = next((n for n in range(devices) if groups * (slots + n) % devices == 0), 0)
        padded = jnp.pad(images, ((0, 0), (0, extra), (0, 0), (0, 0), (0, 0)))
        encoded = encode(shard(padded.reshape(-1, *images.shape[2:]), "batch", None, None, None))
    encoded = shard(encoded.reshape(groups, slots + extra, *encoded.shape[1:]), "batch", None, None, None)
    return encoded[:, :slots].reshape(groups * slots, *encoded.shape[2:])


KINDS = {"generative": Vila, "contrastive": TwoTower}


def build(cfg: Any, kind: str, key: jax.Array) -> nnx.Module:
    """Makes a model with random parameters.

    Args:
      cfg: `config.model`.
      kind: 'generative' (Vila) or 'contrastive' (TwoTower).
      key: random key; LoRA draws from a stream of its own, so base parameters do not depend on the rank.

    Raises:
      UserError: unknown kind or family, or sizes that do not fit.
    """
    model = _family(KINDS, "kind", kind)
    return model(cfg, rngs=nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1)))


def abstract_model(cfg: Any, kind: str) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Structure and parameter shapes (nested dict of ShapeDtypeStruct) of a model; allocates nothing."""
    return compat.split(nnx.eval_shape(lambda: build(cfg, kind, jax.random.key(0))))


def init_params(cfg: Any, kind: str, key: jax.Array) -> dict[str, Any]:
    """Random parameters as a nested dict.

    Pure: jit it with `out_shardings`, and every device makes only its own part.
    """
    return compat.split(build(cfg, kind, key))[1]


def merge(graphdef: nnx.GraphDef, params: dict[str, Any]) -> Any:
    """The model of `graphdef` with `params`; the inverse of taking them apart."""
    model = compat.merge(graphdef, params)
    find_weights(model)
    return model


def _family(table: dict[str, Any], key: str, name: str) -> Any:
    if name not in table:
        raise UserError(f"{key} {name!r} is unknown; choose from {sorted(table)}")
    return table[name]


def projector_width(cfg: Any) -> int:
    """Channels of the features that the projector of a `config.model` takes."""
    return cfg.vision_tower.hidden_size * image_layout(cfg).feature_maps


def _layout(cfg: Any) -> ImageLayout:
    layout = image_layout(cfg)
    if layout.tile_size != cfg.vision_tower.image_size:
        raise UserError(
            f"config model.image_size={layout.tile_size}, but model.vision_tower.image_size="
            f"{cfg.vision_tower.image_size}; make them equal"
        )
    columns = cfg.projector.type == "mlp_downsample" and cfg.projector.token_order == "column"
    if layout.mode == "dynamic_s2" and columns:
        raise UserError(
            "config model.image_aspect_ratio='dynamic_s2' puts tokens of tiles together row by row, but "
            f"model.projector.token_order={cfg.projector.token_order!r}; set it to 'row'"
        )
    return layout


def tokens_per_image(cfg: Any) -> int:
    """T of a `config.model`, without building it."""
    grid = cfg.vision_tower.image_size // cfg.vision_tower.patch_size
    block = plan(cfg.projector.type, projector_width(cfg), cfg.llm.hidden_size).block
    return grid_tokens(grid, block)
