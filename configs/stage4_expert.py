"""Stage 4, expert-guided instruction tuning: three of four dialogues call an expert and read its answer."""

from ml_collections import ConfigDict
from vilam3_jax.configs import pods, stage3_instruct


def get_config(arg: str = "tiny") -> ConfigDict:
    """`arg` names a model of configs/models."""
    config = stage3_instruct.get_config(arg)
    config.name = "stage4_expert"
    config.data.experts = "mixed"
    config.schedule.peak = 2e-5
    # Two epochs of VILA-M3's 1,840,428 samples of about 770 tokens.
    return pods.shape(config, steps=2800)
