"""Quickstart, stage 2b: projector and LoRA on captions and text-only reports."""

from ml_collections import ConfigDict
from vilam3_jax.configs import stage2b_pretrain
from vilam3_jax.configs.quickstart import common


def get_config(arg: str = "default") -> ConfigDict:
    """`arg` is a size: smoke, default or full."""
    config = stage2b_pretrain.get_config(common.model_name(arg))
    config = common.shape(config, arg, dict(smoke=15, default=16, full=50), peak=1e-3)
    config.data.seq_len = 256
    config.data.images_per_group = 8
    if arg != "smoke":
        config.trainable = ((r"vision_tower/.*", 0.0), (r"projector/.*", 3.0), *common.LLM_LORA)
    return config
