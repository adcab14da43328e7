"""What runs of the published sizes share: batches for a slice of 64 chips."""

from collections.abc import Mapping

from ml_collections import ConfigDict


def shape(
    config: ConfigDict, images_per_group: Mapping[str, int] | None = None, steps: int = 0
) -> ConfigDict:
    """Gives the published sizes rows, mesh and length; small models keep theirs.

    128 rows of 4,096 tokens hold about as many samples as VILA-M3's batches (1,024), two rows for each of 64
    chips. A larger slice wants `data.global_rows` of two a chip.

    Args:
      config: a stage's config with its model.
      images_per_group: model → image slots of a group, as measured by `benchmarks/packing.py`. What fits
        other data, or a projector with other lengths, is said by `vilam3 data stats`.
      steps: length of the run; 0: as the config has it.
    """
    name = config.model.name
    if not name.startswith("vila_m3_"):
        return config
    config.data.seq_len = 4096
    config.data.rows_per_group = 2
    config.data.global_rows = 128
    if images_per_group:
        config.data.images_per_group = images_per_group[name]
    config.data.loader_shards = 64
    config.data.text_len = config.model.text_tower.max_length
    config.data.global_pairs = 8192
    if config.model.vision_tower.type == "intern_vit":  # 25 heads: over `tensor` it has its queries split
        config.activation_rules.tower_heads, config.activation_rules.tower_queries = "", "tensor"
    # Whole groups of 64 under `fsdp`; what a slice has beyond that holds the same parameters again.
    config.mesh.data, config.mesh.fsdp = -1, 64
    config.checkpoint_every = 100
    config.num_steps = steps or config.num_steps
    return config
