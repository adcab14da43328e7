"""Batches and meshes of the published sizes on TPU slices."""

from collections.abc import Mapping

from ml_collections import ConfigDict


def slice64(
    config: ConfigDict, images_per_group: Mapping[str, int] | None = None, steps: int = 0
) -> ConfigDict:
    """Sets rows, mesh and length for a slice of 64 chips.

    128 rows of 4,096 tokens hold about as many samples as VILA-M3's batches (1,024), two rows per chip. Scale
    `data.global_rows` with the number of chips.

    Args:
      config: a stage's config with its model.
      images_per_group: model → image slots of a group, as measured by `benchmarks/packing.py`. For other data
        or projectors ask `vilam3 data stats`.
      steps: length of the run; 0: unchanged.
    """
    config.data.seq_len = 4096
    config.data.rows_per_group = 2
    config.data.global_rows = 128
    if images_per_group:
        config.data.images_per_group = images_per_group[config.model.name]
    config.data.loader_shards = 64
    config.data.text_len = config.model.text_tower.max_length
    config.data.global_pairs = 8192
    if config.model.vision_tower.type == "intern_vit":  # 25 heads are not divisible, so its queries are split
        config.activation_rules.tower_heads, config.activation_rules.tower_queries = "", "tensor"
    # Groups of 64 chips under `fsdp`; larger slices hold several copies of the parameters.
    config.mesh.data, config.mesh.fsdp = -1, 64
    config.num_steps = steps or config.num_steps
    return config
