"""Quickstart, stage 4: half of the dialogues ask an expert and read its answer."""

from ml_collections import ConfigDict
from vilam3_jax.configs import stage4_expert
from vilam3_jax.configs.quickstart import common


def get_config(arg: str = "default") -> ConfigDict:
    """`arg` is a size: smoke, default or full."""
    config = stage4_expert.get_config(common.model_name(arg))
    config = common.shape(config, arg, dict(smoke=60, default=27, full=225), peak=1e-3)
    # Rows of 768 would hold the longest dialogues too, but took 10 GB; those over 512 tokens are put aside.
    config.data.images_per_group = 6
    if arg != "smoke":
        config.trainable = ((r"vision_tower/.*", 0.3), (r"projector/.*", 1.0), *common.LLM_LORA)
    return config
