"""Quickstart, stage 4: dialogues that an expert can help with ask it and read its answer."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, stage4_expert
from vilam3_jax.configs.quickstart import common


def get_config(arg: str = "default") -> ConfigDict:
    """`arg` is a size: smoke, default or full."""
    config = stage4_expert.get_config(common.model_name(arg))
    config = common.shape(config, arg, dict(smoke=20, default=84, full=440), peak=1.5e-3)
    config.data.mixture = (("instruct", 1), ("lookups", 0.15))  # keeps the reading that stage 2b taught
    config.data.seq_len = dict(smoke=768, default=640, full=896)[arg]  # at least the longest dialogue
    config.data.images_per_group = 4
    config.data.expert_share = 0.85  # stage 3 has taught answers without cards
    if arg != "smoke":
        adapters = models.adapters_only(config.model)
        config.trainable = ((r"vision_tower/.*", 0.1), (r"projector/.*", 0.7), *adapters)
    return config
