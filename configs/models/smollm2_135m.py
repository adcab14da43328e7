"""SmolLM2-135M with its real weights behind a small vision tower trained from scratch.

Every width is divisible by 3, so `tensor=3` splits the 9 query and 3 key-value heads evenly.
"""

from ml_collections import ConfigDict
from vilam3_jax.configs.models import assemble
from vilam3_jax.configs.models.parts import llms, towers


def get_model() -> ConfigDict:
    """Returns the `model` section: a 96-pixel tower (9 tokens per image) and SmolLM2-135M with LoRA."""
    tower = towers.siglip(
        image_size=96, patch_size=16, hidden_size=192, num_layers=4, num_heads=6, mlp_dim=576
    )
    llm = llms.llama(
        49_152,
        576,
        30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        rope_theta=100_000.0,
        max_positions=8192,
        tie_embeddings=True,
        lora_rank=16,
        lora_alpha=32.0,
        lora_targets=("q", "k", "v", "o"),
    )
    return assemble(
        "smollm2_135m",
        tower,
        llm,
        template="chatml",
        dtype="float32",
        remat="none",
        # About one pair in seven of a batch of slices matches: log(1/7) is near -2.
        text_tower=towers.text_tower_of(
            tower, vocab_size=49_152, num_layers=1, max_length=32, logit_bias=-2.0
        ),
        projector=dict(type="mlp_downsample", token_order="row"),
    )
