"""Makes pytrees of the batches, which `data` keeps free of JAX."""

from __future__ import annotations

import dataclasses

import jax

from vilam3_jax.data.batches import PackedBatch, PairBatch

for _kind in (PackedBatch, PairBatch):
    jax.tree_util.register_dataclass(
        _kind, data_fields=[field.name for field in dataclasses.fields(_kind)], meta_fields=[]
    )
