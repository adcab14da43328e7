"""Whole imported models in memory, to compare with what an import writes."""

import numpy as np

from vilam3_jax.checkpoints.exports import Leaf
from vilam3_jax.convert.importer import check_rules, read_leaf


def fill(checkpoint, dtype=np.float32):
    """Reads every parameter of an opened checkpoint: path → array."""
    rules = {rule.target: (part, rule) for part in checkpoint.parts for rule in part.rules}
    return {
        path: np.asarray(read_leaf(*rules[path], Leaf(path, path, 0, shape, dtype)))
        for path, shape in check_rules(checkpoint).items()
    }
