"""SmolLM2-135M with its real weights behind a small vision tower trained from nothing.

Every width divides by 3, so `tensor=3` splits the 9 query and 3 key-value heads evenly.
"""

from ml_collections import ConfigDict


def get_model() -> ConfigDict:
    """Returns the `model` section: a 96-pixel tower (9 tokens an image) and SmolLM2-135M with LoRA."""
    return ConfigDict(
        dict(
            name="smollm2_135m",
            image_size=96,
            template="chatml",
            tokenizer="",
            dtype="float32",
            param_dtype="float32",
            remat="none",
            vision_tower=dict(
                type="siglip",
                image_size=96,
                patch_size=16,
                hidden_size=192,
                num_layers=4,
                num_heads=6,
                mlp_dim=576,
                norm_eps=1e-6,
                select_layer=-2,
            ),
            text_tower=dict(
                vocab_size=49_152,
                hidden_size=192,
                num_layers=1,
                num_heads=6,
                mlp_dim=576,
                max_length=32,
                norm_eps=1e-6,
                logit_bias=-2.0,  # in a batch of slices about one pair in seven belongs together
            ),
            projector=dict(type="mlp_downsample", token_order="row"),
            llm=dict(
                type="llama",
                vocab_size=49_152,
                hidden_size=576,
                num_layers=30,
                num_heads=9,
                num_kv_heads=3,
                head_dim=64,
                mlp_dim=1536,
                rope_theta=100_000.0,
                rope_scaling=None,
                norm_eps=1e-5,
                qkv_bias=False,
                o_bias=False,
                qk_norm=False,
                tie_embeddings=True,
                lora_rank=16,
                lora_alpha=32.0,
                lora_targets=("q", "k", "v", "o"),
            ),
        )
    )
