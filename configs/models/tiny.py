"""A random model that trains in seconds, for tests and smoke runs. Same code as the large ones."""

from ml_collections import ConfigDict
from vilam3_jax.configs.models import assemble
from vilam3_jax.configs.models.parts import llms, towers


def get_model() -> ConfigDict:
    """Returns the `model` section: 32-pixel tower of 2+1 blocks, 2-layer Llama with grouped queries."""
    tower = towers.siglip(image_size=32, patch_size=8, hidden_size=48, num_layers=3, num_heads=4, mlp_dim=96)
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128)
    return assemble(
        "tiny",
        tower,
        llms.llama(2048, 64, 2, tie_embeddings=True, **sizes),
        template="chatml",
        dtype="float32",
        remat="none",
        # logit_bias: -log of 32 pairs per batch.
        text_tower=towers.text_tower_of(tower, vocab_size=2048, num_layers=2, max_length=32, logit_bias=-3.5),
        projector=dict(type="mlp_downsample", token_order="row"),
    )
