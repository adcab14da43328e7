"""Rows of the published sizes: 4,096 tokens, in groups of two that share their image slots."""

from collections.abc import Mapping

from ml_collections import ConfigDict


def use_published_rows(config: ConfigDict, model: str, images_per_group: Mapping[str, int]) -> None:
    """Sets length, groups and batch where `model` is a published size.

    Args:
      config: a recipe's config.
      model: the recipe's argument, swapped parts included.
      images_per_group: size → image slots of a group, as measured by `benchmarks/packing.py`. What fits
        other data, or a projector with other lengths, is said by `vilam3 data stats`.
    """
    size = model.partition(",")[0]
    if size in images_per_group:
        config.data.seq_len = 4096
        config.data.rows_per_group = 2
        config.data.images_per_group = images_per_group[size]
        config.data.global_rows = 128  # about as many samples as VILA-M3's 1,024
        config.data.loader_shards = 64
