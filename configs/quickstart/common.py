"""What the five quickstart runs share, and their lengths by size.

`default` takes about 15 minutes on 2 CPU cores, `full` 90; `smoke` is the tiny model on generated phantoms.
Same code in all three: only step counts and widths differ.
"""

from ml_collections import ConfigDict

from vilam3_jax.errors import UserError

SIZES = ("smoke", "default", "full")


def model_name(size: str) -> str:
    """The model of a size."""
    if size not in SIZES:
        raise UserError(f"quickstart size {size!r}: unknown; known sizes are {', '.join(SIZES)}")
    return "tiny" if size == "smoke" else "smollm2_135m"


def shape(config: ConfigDict, size: str, steps: dict[str, int], peak: float) -> ConfigDict:
    """Applies the quickstart's rows, mesh and length to a stage's config.

    Args:
      config: a stage's own recipe.
      size: one of SIZES.
      steps: size → number of optimizer steps.
      peak: learning rate at the top of the schedule.
    """
    config.model.cards = "quickstart"
    config.model.preprocessing.modalities = ("CT", "MR", "CR", "DX")
    config.num_steps = steps[size]
    config.schedule.peak = peak
    config.schedule.warmup_fraction = 0.1
    config.data.augment = True
    config.data.loader_shards = 2
    config.data.seq_len = 512
    config.data.global_rows = 2 if size == "smoke" else 1
    config.data.images_per_group = 4
    config.loss_chunk = 64
    config.eval_every = config.num_steps
    config.eval_batches = dict(smoke=2, default=6, full=16)[size]
    config.checkpoint_every = max(20, config.num_steps // 2)
    if size == "smoke":  # shows sharding on any machine; without it, a step is a fifth faster
        config.mesh.fsdp, config.mesh.tensor, config.mesh.cpu_devices = 2, 2, 4
    return config
