"""Quickstart, stage 2a: the projector learns to speak to SmolLM2."""

from ml_collections import ConfigDict
from vilam3_jax.configs import stage2a_align
from vilam3_jax.configs.quickstart import common


def get_config(arg: str = "default") -> ConfigDict:
    """`arg` is a size: smoke, default or full."""
    config = stage2a_align.get_config(common.model_name(arg))
    config = common.shape(config, arg, dict(smoke=15, default=56, full=240), peak=5e-3)
    config.data.seq_len = 128
    config.data.global_rows = 4 if arg == "smoke" else 1  # more and smaller steps read more from the images
    return config
