"""Quickstart, stage 1: a small tower learns from slices and their captions."""

from ml_collections import ConfigDict
from vilam3_jax.configs import stage1_vision
from vilam3_jax.configs.quickstart import common


def get_config(arg: str = "default") -> ConfigDict:
    """`arg` is a size: smoke, default or full."""
    config = stage1_vision.get_config(common.model_name(arg))
    config = common.shape(config, arg, dict(smoke=25, default=90, full=280), peak=1e-3)
    # Few steps: the temperature must get further than the towers' rate would take it.
    config.trainable = ((r"logit_(scale|bias)", 5.0), (r".*", 1.0))
    config.optimizer.weight_decay = 0.05
    config.eval_batches = 8  # all of the held-out part
    config.data.global_pairs = 32
    config.data.text_len = 32
    return config
