"""The section `data` of a run's config."""

from __future__ import annotations

import dataclasses
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import Section, setting

EXPERT_MODES = ("on", "off", "falsified", "mixed")
MISSING_POLICIES = ("skip", "plain", "error")
SLICE_CHOICES = ("even", "informative", "finding")


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """What a run trains on, and the shapes of its batches.

    Attributes:
      path: folder of datasets that `vilam3 prepare` wrote.
      annotations: annotation store of the experts.
      mixture: rows (dataset or dataset:rule, weight), or names of `configs/mixtures`; empty for the single
        dataset at `path`.
      experts: whether dialogues show expert results.
      expert_share: share of dialogues with experts if `experts` is 'mixed'.
      missing_annotation: what happens to a dialogue without its annotation: 'skip', 'plain' or 'error'.
      volume_slices: slices that stand for a whole volume.
      slice_choice: which slices these are, see `volume_slices.SliceRule`.
      dialogue_parity: dialogues word for word as the reference's.
      dialogue_min_lesion_ml: smallest lesion that a dialogue mentions, in ml.
      augment: alter training images.
      seq_len: tokens of a packed row.
      rows_per_group: packed rows that share image slots.
      images_per_group: image slots of a group.
      global_rows: packed rows of the global batch.
      loader_shards: shards of the order of samples, a constant of the run.
      text_len: tokens of a caption (contrastive).
      global_pairs: pairs of the global batch (contrastive).
      workers: worker processes of the loader; 0 for threads.
    """

    key = "data"
    path: str = ""
    annotations: str = ""
    mixture: tuple[Any, ...] = ()
    experts: str = setting(default="off", choices=EXPERT_MODES)
    expert_share: float = setting(default=0.75, at_least=0, at_most=1)
    missing_annotation: str = setting(default="skip", choices=MISSING_POLICIES)
    volume_slices: int = setting(default=4, at_least=1)
    slice_choice: str = setting(default="even", choices=SLICE_CHOICES)
    dialogue_parity: bool = False
    dialogue_min_lesion_ml: float = setting(default=0.1, at_least=0)
    augment: bool = False
    seq_len: int = setting(default=512, at_least=1)
    rows_per_group: int = setting(default=1, at_least=1)
    images_per_group: int = setting(default=4, at_least=0)
    global_rows: int = setting(default=8, at_least=1)
    loader_shards: int = setting(default=8, at_least=1)
    text_len: int = setting(default=32, at_least=1)
    global_pairs: int = setting(default=64, at_least=1)
    workers: int = setting(default=0, at_least=0)

    @property
    def groups(self) -> int:
        """Groups of packed rows in the global batch."""
        return self.global_rows // self.rows_per_group

    def check_groups(self, grad_accum: int) -> None:
        """Raises UserError if the packed rows do not divide into groups and micro-batches."""
        if self.global_rows % (self.rows_per_group * grad_accum):
            raise UserError(
                f"config data.global_rows={self.global_rows} does not divide into groups of "
                f"data.rows_per_group={self.rows_per_group} times grad_accum={grad_accum}"
            )
