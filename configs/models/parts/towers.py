"""Vision towers: `model.vision_tower`. Sizes are those of the checkpoints' own `config.json`."""

from ml_collections import ConfigDict


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
    return ConfigDict(
        dict(
            type="intern_vit",
            image_size=448,
            patch_size=14,
            hidden_size=3200,
            num_layers=45,
            num_heads=25,
            mlp_dim=12_800,
            norm_eps=1e-6,
            select_layer=-1,
        )
    )


def _so400m(image_size: int, head: bool = True) -> ConfigDict:
    sizes = dict(patch_size=14, hidden_size=1152, num_layers=27, num_heads=16, mlp_dim=4304)
    return siglip(image_size=image_size, head=head, **sizes)


def siglip(*, head: bool = True, **sizes: int) -> ConfigDict:
    """A SigLIP-shaped tower that gives hidden state -2; `head`: it has the pooling head of stage 1."""
    return ConfigDict(dict(type="siglip", norm_eps=1e-6, select_layer=-2, head=head, **sizes))


# What a tower's text tower has of its own: SigLIP 2 reads Gemma's vocabulary.
TEXT_CHANGES = {"siglip2_so400m_384": dict(vocab_size=256_000)}


def text_tower_of(tower: ConfigDict, **changes: float) -> ConfigDict:
    """The text tower that SigLIP trains beside `tower`: of its sizes, save for `changes`."""
    sizes = {key: tower[key] for key in ("hidden_size", "num_layers", "num_heads", "mlp_dim")}
    return ConfigDict(
        dict(vocab_size=32_000, max_length=64, norm_eps=1e-6, logit_bias=-10.0) | sizes | changes
    )


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
