"""Stage 1, vision pre-training: image and text towers, with a sigmoid contrastive loss."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, pods

from vilam3_jax import config as config_lib


def get_config(arg: str = "tiny") -> ConfigDict:
    """`arg` names a model of configs/models."""
    config = config_lib.base_config()
    config.name = "stage1_vision"
    config.task = "contrastive"
    config.model = models.get(arg)
    config.data.mixture = (("pairs", 1.0),)
    config.trainable = ((r".*", 1.0),)
    config.schedule.peak = 1e-3
    config.optimizer.weight_decay = 1e-4
    return pods.slice64(config) if models.needs_slice(arg) else config
