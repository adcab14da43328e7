"""Quickstart, stage 1: a small tower learns from slices and their captions."""

from ml_collections import ConfigDict
from vilam3_jax.configs import stage1_vision
from vilam3_jax.configs.quickstart import common


def get_config(arg: str = "default") -> ConfigDict:
    """`arg` is a size: smoke, default or full."""
    config = stage1_vision.get_config(common.model_name(arg))
    config = common.shape(config, arg, dict(smoke=40, default=120, full=600), peak=1e-3)
    config.data.global_pairs = 32
    config.data.text_len = 32
    return config
