"""The section `model` of a config: the parts of a model, and how it reads images and text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vilam3_jax.data.image_layout import ImageLayout, image_layout
from vilam3_jax.errors import UserError
from vilam3_jax.models import families
from vilam3_jax.models.projector import ProjectorConfig, layers_of
from vilam3_jax.models.siglip import SiglipTextConfig
from vilam3_jax.runtime.settings import Section, from_mapping, setting

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The section `model`; `vision_tower` and `llm` are sections of their families.

    Attributes:
      name: of the model, for reports.
      image_size: side of an image in pixels; 0 for that of the vision tower.
      image_aspect_ratio, s2_scales, max_tiles: see `data.image_layout`.
      template: chat template, see `data.templates`.
      tokenizer: folder of the tokenizer.
      dtype: type of activations.
      param_dtype: type of parameters.
      remat: see `layers.remat_layer`.
      text_tower: text tower of contrastive training.
      text: rules for text around images, see `data.text_rules`.
      preprocessing: see `data.preprocessing`; empty for the defaults.
      cards: name of the list of expert cards.
      card_list: the cards themselves, in exports.
      expert_wording: sentences of expert turns: 'plain', or 'vila_m3' of the released checkpoints.
      expert_verdicts: whether checks of expert results are shown.
      expert_threshold: probability above which a class counts as found.
    """

    key = "model"
    name: str = ""
    image_size: int = 0
    image_aspect_ratio: str = "resize"
    s2_scales: tuple[int, ...] = ()
    max_tiles: int = 12
    template: str = ""
    tokenizer: str = ""
    dtype: str = setting(default="float32", choices=DTYPES)
    param_dtype: str = setting(default="float32", choices=DTYPES)
    remat: str = "none"
    vision_tower: Any = None
    text_tower: SiglipTextConfig | None = None
    projector: ProjectorConfig | None = None
    llm: Any = None
    text: Mapping[str, Any] | None = None
    preprocessing: Mapping[str, Any] | None = None
    cards: str = "experts"
    card_list: tuple[Any, ...] | None = None
    expert_wording: str = "plain"
    expert_verdicts: bool = False
    expert_threshold: float = setting(default=0.5, at_least=0, at_most=1)

    def validate(self) -> None:
        """Builds the sections of vision tower and LLM by their `type`."""
        for name in ("vision_tower", "llm"):
            section = getattr(self, name)
            if isinstance(section, Mapping):
                object.__setattr__(self, name, families.config_of(name, section))
        if not self.image_size and self.vision_tower is not None:
            object.__setattr__(self, "image_size", self.vision_tower.image_size)

    @property
    def image_layout(self) -> ImageLayout:
        """How the model reads images.

        Raises:
          UserError: the image size differs from the tower's, or the token order does not suit the mode.
        """
        layout = image_layout(self)
        if layout.tile_size != self.vision_tower.image_size:
            raise UserError(
                f"config model.image_size={layout.tile_size}, but model.vision_tower.image_size="
                f"{self.vision_tower.image_size}; make them equal"
            )
        projector = self.projector
        if layout.mode == "dynamic_s2" and projector is not None and projector.reads_columns:
            raise UserError(
                "config model.image_aspect_ratio='dynamic_s2' assembles the tokens of tiles row by row, but "
                f"model.projector.token_order={projector.token_order!r}; set it to 'row'"
            )
        return layout

    @property
    def projector_width(self) -> int:
        """Channels of the projector's input."""
        return self.vision_tower.hidden_size * image_layout(self).feature_maps

    @property
    def tokens_per_image(self) -> int:
        """Positions of one image in the text (T)."""
        assert self.projector is not None
        grid = self.vision_tower.image_size // self.vision_tower.patch_size
        layers = layers_of(self.projector.type, self.projector_width, self.llm.hidden_size)
        return layers.num_tokens(grid)


def resolve(values: Any) -> ModelConfig:
    """A typed section from a ConfigDict or JSON; a `ModelConfig` is returned unchanged."""
    return values if isinstance(values, ModelConfig) else from_mapping(ModelConfig, values)
