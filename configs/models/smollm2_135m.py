"""SmolLM2-135M with its real weights behind a small vision tower trained from nothing.

Every width divides by 3, so `tensor=3` splits the 9 query and 3 key-value heads evenly.
"""

from ml_collections import ConfigDict
from vilam3_jax.configs.models.parts import llms, towers


def get_model() -> ConfigDict:
    """Returns the `model` section: a 96-pixel tower (9 tokens an image) and SmolLM2-135M with LoRA."""
    tower = towers.siglip(
        image_size=96, patch_size=16, hidden_size=192, num_layers=4, num_heads=6, mlp_dim=576
    )
    return ConfigDict(
        dict(
            name="smollm2_135m",
            image_size=96,
            image_aspect_ratio="resize",
            s2_scales=(),
            max_tiles=12,
            template="chatml",
            tokenizer="",
            dtype="float32",
            param_dtype="float32",
            remat="none",
            vision_tower=tower,
            # In a batch of slices about one pair in seven belongs together: log(1/7) is near -2.
            text_tower=towers.text_tower_of(
                tower, vocab_size=49_152, num_layers=1, max_length=32, logit_bias=-2.0
            ),
            projector=dict(type="mlp_downsample", token_order="row"),
            llm=llms.llama(
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
            ),
        )
    )
