"""The eight members of the ensemble, as `ensemble.json` lists them. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math

RELEASE = "https://github.com/mlmed/torchxrayvision/releases/download/v1"


@dataclasses.dataclass(frozen=True)
class Member:
    """One trained network.

    Attributes:
      name: as torchxrayvision calls its weights.
      architecture: "densenet121" or "resnet50".
      resolution: pixels a side of its input.
      file: its file in the release.
      thresholds: operating point of each class, in the order of `Ensemble.classes`; NaN where it was not
        trained on the class.
    """

    name: str
    architecture: str
    resolution: int
    file: str
    thresholds: tuple[float, ...]

    @property
    def url(self) -> str:
        return f"{RELEASE}/{self.file}"

    @property
    def weights_file(self) -> str:
        """Name of its converted weights, in the expert's folder."""
        return f"{self.name}.safetensors"


@dataclasses.dataclass(frozen=True)
class Table:
    """The whole ensemble.

    Attributes:
      classes: the 18 findings, in the order of the networks' outputs.
      members: the networks.
      reference_sets: class to the members that VILA-M3 asks; all members for a class that is not listed.
    """

    classes: tuple[str, ...]
    members: tuple[Member, ...]
    reference_sets: dict[str, tuple[str, ...]]

    def asked(self, member: str, finding: str) -> bool:
        """Whether VILA-M3 takes the answer of `member` for the class `finding`."""
        asked = self.reference_sets.get(finding)
        return asked is None or member in asked


@functools.cache
def load_table() -> Table:
    """Reads `ensemble.json`."""
    text = (
        importlib.resources.files("vilam3_experts.xrv").joinpath("ensemble.json").read_text(encoding="utf-8")
    )
    stored = json.loads(text)
    members = tuple(
        Member(**{**row, "thresholds": tuple(math.nan if t is None else t for t in row["thresholds"])})
        for row in stored["members"]
    )
    sets = {finding: tuple(names) for finding, names in stored["reference_sets"].items()}
    return Table(tuple(stored["classes"]), members, sets)
