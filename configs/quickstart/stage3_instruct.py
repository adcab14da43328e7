"""Quickstart, stage 3: tower, projector and LoRA on dialogues without experts."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, stage3_instruct
from vilam3_jax.configs.quickstart import common


def get_config(arg: str = "default") -> ConfigDict:
    """`arg` is a size: smoke, default or full."""
    config = stage3_instruct.get_config(common.model_name(arg))
    config = common.shape(config, arg, dict(smoke=25, default=26, full=120), peak=1e-3)
    config.data.mixture = (("instruct", 1), ("lookups", 0.3))  # keeps the reading that stage 2b taught
    config.data.seq_len = 384
    config.data.images_per_group = 8
    if arg != "smoke":
        adapters = models.adapters_only(config.model)
        config.trainable = ((r"vision_tower/.*", 0.3), (r"projector/.*", 3.0), *adapters)
    return config
