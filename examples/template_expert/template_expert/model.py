"""The expert itself; imported when it runs, so torch and the like belong here."""

import numpy as np
from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.weights import Weights

from vilam3_jax.data.volumes import Volume

AIR_HU = -300


class Body:
    """Built once, then asked for one scan after the other."""

    def __init__(self, weights: Weights) -> None:
        """Loads the network here: `weights.files` holds the checked bytes of the descriptor's files."""

    def run(self, data: Volume, args: str) -> Output:
        """Segments a scan; `args` is one of the card's.

        Raises:
          ExpertFailure: no answer; it is stored, and the model is told.
        """
        body = data.voxels > AIR_HU
        if not body.any():
            raise ExpertFailure("nothing in this scan is denser than air")
        inside = body if args == "body" else ~body
        return Output(labels=inside.astype(np.uint8), label_names={1: args})
