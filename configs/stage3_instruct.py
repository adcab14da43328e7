"""Stage 3, instruction tuning: tower, projector and LLM on dialogues without experts."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, pods

from vilam3_jax import config as config_lib

_IMAGES_PER_GROUP = dict(vila_m3_3b=26, vila_m3_8b=26, vila_m3_13b=26, vila_m3_40b=22)


def get_config(arg: str = "tiny") -> ConfigDict:
    """`arg` names a model of configs/models."""
    config = config_lib.base_config()
    config.name = "stage3_instruct"
    config.model = models.get(arg)
    config.data.mixture = (("instruct", 1.0),)
    config.trainable = (*models.adapters_only(config.model), (r".*", 1.0))
    config.schedule.peak = 1e-4
    return pods.slice64(config, _IMAGES_PER_GROUP) if models.needs_slice(arg) else config
