"""Stage 2b, vision-language pre-training: projector and LLM on captions and text-only reports."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, pods

from vilam3_jax import config as config_lib

_IMAGES_PER_GROUP = dict(vila_m3_3b=26, vila_m3_8b=26, vila_m3_13b=26, vila_m3_40b=22)


def get_config(arg: str = "tiny") -> ConfigDict:
    """`arg` names a model of configs/models."""
    config = config_lib.base_config()
    config.name = "stage2b_pretrain"
    config.model = models.get(arg)
    config.data.mixture = (("captions", 1), ("reports", 0.6))
    config.trainable = ((r"vision_tower/.*", 0.0), *models.adapters_only(config.model), (r".*", 1.0))
    config.schedule.peak = 5e-5
    return pods.slice64(config, _IMAGES_PER_GROUP) if models.needs_slice(arg) else config
