"""Fine-tuning on a small dataset: the LLM's LoRA alone, with held-out losses; see docs/your_own_data.md."""

from ml_collections import ConfigDict
from vilam3_jax.configs import models, stage3_instruct


def get_config(arg: str = "smollm2_135m") -> ConfigDict:
    """`arg` names a model of configs/models; one without LoRA gets it."""
    config = stage3_instruct.get_config(arg)
    config.name = "small_data"
    if not config.model.llm.lora_rank:
        config.model.llm.update(lora_rank=16, lora_alpha=32.0, lora_targets=("q", "k", "v", "o"))
    config.trainable = (*models.adapters_only(config.model), (r".*", 0.0))
    config.data.mixture = ()  # `data.path` is the folder of one dataset
    config.data.seq_len, config.data.global_rows, config.data.images_per_group = 512, 2, 8
    config.data.augment = True
    config.num_steps = 100
    config.schedule.peak = 5e-4
    config.schedule.warmup_fraction = 0.2  # the first batches of few samples are alike
    config.eval_every = config.checkpoint_every = 20
    return config
