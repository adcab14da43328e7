"""What runs of the published sizes share: batches for slices of 64 chips and more."""

from ml_collections import ConfigDict


def shape(config: ConfigDict, steps: int = 0) -> ConfigDict:
    """Gives the published sizes rows, mesh and length; small models keep theirs.

    256 rows of 4,096 tokens hold about 1,300 samples of VILA-M3's mixture (770 tokens and 1.7 images each, by
    our estimate); VILA-M3 has batches of 1,024 samples.

    Args:
      config: a stage's config with its model.
      steps: length of the run; 0: as the config has it.
    """
    if not config.model.name.startswith("vila_m3_"):
        return config
    config.data.seq_len = 4096
    config.data.global_rows = 256
    config.data.images_per_group = 9
    config.data.loader_shards = 64
    config.data.text_len = config.model.text_tower.max_length
    config.data.global_pairs = 8192
    # Whole groups of 64 under `fsdp`; what a slice has beyond that holds the same parameters again.
    config.mesh.data, config.mesh.fsdp = -1, 64
    config.checkpoint_every = 100
    config.num_steps = steps or config.num_steps
    return config
