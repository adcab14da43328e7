"""Vision towers: `model.vision_tower`. Sizes are those of the checkpoints' own `config.json`."""

from typing import Any

from ml_collections import ConfigDict

from vilam3_jax.models.intern_vit import InternVitConfig
from vilam3_jax.models.siglip import SiglipConfig, SiglipTextConfig


def siglip_so400m_384() -> ConfigDict:
    """google/siglip-so400m-patch14-384: 27 x 27 tokens of 1152; VILA-1.5 and VILA-M3 3B to 13B."""
    return _so400m(384)


def siglip_so400m_448() -> ConfigDict:
    """PaliGemma's so400m at 448 pixels: 32 x 32 tokens of 1152, no pooling head; NVILA."""
    return _so400m(448, head=False)


def siglip2_so400m_384() -> ConfigDict:
    """google/siglip2-so400m-patch14-384: of fixed resolution, so SigLIP's tower with other weights."""
    return _so400m(384)


def siglip_base_224() -> ConfigDict:
    """google/siglip-base-patch16-224: 14 x 14 tokens of 768."""
    return siglip(image_size=224, patch_size=16, hidden_size=768, num_layers=12, num_heads=12, mlp_dim=3072)


def intern_vit_6b_448() -> ConfigDict:
    """OpenGVLab/InternViT-6B-448px-V1-2: 32 x 32 tokens of 3200; VILA-1.5 40B."""
    sizes = dict(patch_size=14, hidden_size=3200, num_layers=45, num_heads=25, mlp_dim=12_800)
    return ConfigDict(InternVitConfig(type="intern_vit", image_size=448, **sizes).to_dict())


def _so400m(image_size: int, head: bool = True) -> ConfigDict:
    sizes = dict(patch_size=14, hidden_size=1152, num_layers=27, num_heads=16, mlp_dim=4304)
    return siglip(image_size=image_size, head=head, **sizes)


def siglip(*, head: bool = True, **sizes: int) -> ConfigDict:
    """A SigLIP that outputs hidden state -2; `head`: with the pooling head of stage 1."""
    return ConfigDict(SiglipConfig(type="siglip", head=head, **sizes).to_dict())


# Changes of a tower's text tower: SigLIP 2 uses Gemma's vocabulary.
TEXT_CHANGES = {"siglip2_so400m_384": dict(vocab_size=256_000)}


def text_tower_of(tower: ConfigDict, **changes: Any) -> ConfigDict:
    """The text tower that SigLIP trains with `tower`, of the same sizes unless changed."""
    sizes = {key: tower[key] for key in ("hidden_size", "num_layers", "num_heads", "mlp_dim")}
    return ConfigDict(SiglipTextConfig(**(sizes | changes)).to_dict())


TOWERS = {
    part.__name__: part
    for part in (
        siglip_so400m_384,
        siglip_so400m_448,
        siglip2_so400m_384,
        siglip_base_224,
        intern_vit_6b_448,
    )
}
