"""A model from nothing that trains in seconds: tests and smoke runs. Same code as the large ones."""

from ml_collections import ConfigDict


def get_model() -> ConfigDict:
    """Returns the `model` section: 32-pixel tower of 2+1 blocks, 2-layer Llama with grouped queries."""
    return ConfigDict(
        dict(
            name="tiny",
            image_size=32,
            template="chatml",
            tokenizer="",
            dtype="float32",
            param_dtype="float32",
            remat="none",
            vision_tower=dict(
                type="siglip",
                image_size=32,
                patch_size=8,
                hidden_size=48,
                num_layers=3,
                num_heads=4,
                mlp_dim=96,
                norm_eps=1e-6,
                select_layer=-2,
            ),
            text_tower=dict(
                vocab_size=2048,
                hidden_size=48,
                num_layers=2,
                num_heads=4,
                mlp_dim=96,
                max_length=32,
                norm_eps=1e-6,
                logit_bias=-3.5,  # -log of 32 pairs a batch
            ),
            projector=dict(type="mlp_downsample", token_order="row"),
            llm=dict(
                type="llama",
                vocab_size=2048,
                hidden_size=64,
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
                mlp_dim=128,
                rope_theta=10_000.0,
                rope_scaling=None,
                norm_eps=1e-5,
                qkv_bias=False,
                o_bias=False,
                qk_norm=False,
                tie_embeddings=True,
                lora_rank=0,
                lora_alpha=16.0,
                lora_targets=(),
            ),
        )
    )
