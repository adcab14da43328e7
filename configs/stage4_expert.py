"""Stage 4, expert-guided instruction tuning: three of four dialogues call an expert and use its result."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, pods, stage3_instruct

_IMAGES_PER_GROUP = dict(vila_m3_3b=17, vila_m3_8b=18, vila_m3_13b=17, vila_m3_40b=15)


def get_config(arg: str = "tiny") -> ConfigDict:
    """`arg` names a model of configs/models."""
    config = stage3_instruct.get_config(arg)
    config.name = "stage4_expert"
    config.data.experts = "mixed"
    config.trainable = (*models.adapters_only(config.model), (r".*", 1.0))
    config.schedule.peak = 2e-5
    if models.needs_slice(arg):
        # Two epochs of VILA-M3's 1,840,428 samples.
        pods.slice64(config, _IMAGES_PER_GROUP, steps=3600)
    return config
