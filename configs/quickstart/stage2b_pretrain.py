"""Quickstart, stage 2b: projector and LoRA on captions, text-only reports and look-ups in expert results."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, stage2b_pretrain
from vilam3_jax.configs.quickstart import common


def get_config(arg: str = "default") -> ConfigDict:
    """`arg` is a size: smoke, default or full."""
    config = stage2b_pretrain.get_config(common.model_name(arg))
    config = common.shape(config, arg, dict(smoke=15, default=84, full=200), peak=2e-3)
    # A text token is cheap here: this is where the LLM learns to read results.
    config.data.mixture = (("captions", 2.5), ("reports", 0.2), ("lookups", 4))
    config.data.seq_len = 384
    if arg != "smoke":
        adapters = models.adapters_only(config.model)
        config.trainable = ((r"vision_tower/.*", 0.0), (r"projector/.*", 1.0), *adapters)
    return config
