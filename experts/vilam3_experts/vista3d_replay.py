"""The CT segmentation expert's stand-in: replays reference label maps under VISTA3D's names and ids.

It answers only for scans of the samples folder that come with such a map, recognised by their content, and
says so for any other.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.weights import Weights, is_samples_folder
from vilam3_jax import paths
from vilam3_jax.data.experts.turns import label_table
from vilam3_jax.data.volumes import Volume, load_label_map, load_volume
from vilam3_jax.datasets.samples import Sample, read_samples
from vilam3_jax.errors import UserError

# Whose maps stand for the expert; radiologists' masks are ground truth and must not be passed off as it.
_SOURCES = ("TotalSegmentator reference map", "generated label map")
_ALIASES = {"urinary bladder": "bladder"}
_MAX_MAP_BYTES = 1 << 30


def _words(name: str) -> frozenset[str]:
    name = name.replace("_", " ").lower()
    return frozenset(_ALIASES.get(name, name).split())


def vista3d_ids(names: dict[int, str]) -> dict[int, int]:
    """Label id in a map to VISTA3D label id, for the names VISTA3D knows.

    Names are compared as sets of words: `lung_upper_lobe_left` is `left lung upper lobe`.
    """
    known = {_words(name): label_id for label_id, name in label_table("VISTA3D").items()}
    return {i: known[_words(name)] for i, name in names.items() if _words(name) in known}


@dataclasses.dataclass
class Vista3dReplay:
    """Reads the samples folder once, when the first scan is asked about."""

    weights: Weights

    def __post_init__(self) -> None:
        folder = self.weights.folder
        if folder is None or not is_samples_folder(folder):
            raise UserError(
                f"{folder}: VISTA3D replays the label maps of a samples folder; point --weights at one "
                "(`python -m vilam3_jax.datasets.samples --out DIR`)"
            )
        self._unread = [
            s for s in read_samples(folder) if s.kind == "ct" and s.label_map and s.label_source in _SOURCES
        ]
        self._by_key: dict[str, Sample] = {}

    def _find(self, key: str) -> Sample | None:
        while key not in self._by_key and self._unread:
            sample = self._unread.pop(0)
            try:
                self._by_key.setdefault(load_volume(sample.path).content_key, sample)
            except UserError:
                # The loop over the data meets the same file and names it.
                continue
        return self._by_key.get(key)

    def run(self, data: Volume, args: str) -> Output:
        """Returns the stored map, whatever the argument: it limits what is told, not what is known.

        Raises:
          ExpertFailure: no reference map for this volume.
        """
        del args
        sample = self._find(data.content_key)
        if sample is None or sample.label_map is None:
            raise ExpertFailure("no reference map for this volume")
        source = load_label_map(sample.label_map, data)
        targets = vista3d_ids(sample.label_names or {})
        table = np.zeros(max(int(source.max()), *targets, 0) + 1, np.uint8)
        for label_id, target in targets.items():
            table[label_id] = target
        names = label_table("VISTA3D")
        digest = hashlib.sha256(paths.read_bytes(sample.label_map, _MAX_MAP_BYTES)).hexdigest()
        return Output(
            labels=table[source],
            label_names={i: names[i] for i in targets.values()},
            weights_sha256=digest,
        )
