"""Stage 2a, alignment: only the projector learns, on captions."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, pods

from vilam3_jax import config as config_lib

_IMAGES_PER_GROUP = dict(vila_m3_3b=34, vila_m3_8b=35, vila_m3_13b=34, vila_m3_40b=27)


def get_config(arg: str = "tiny") -> ConfigDict:
    """`arg` names a model of configs/models."""
    config = config_lib.base_config()
    config.name = "stage2a_align"
    config.model = models.get(arg)
    config.data.mixture = (("captions", 1.0),)
    config.trainable = ((r"projector/.*", 1.0), (r".*", 0.0))
    config.schedule.peak = 1e-3
    if models.needs_slice(arg):
        # 595 thousand captions of about 220 tokens, as VILA-1.5.
        pods.slice64(config, _IMAGES_PER_GROUP, steps=260)
    return config
