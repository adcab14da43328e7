"""The eight members of the ensemble, read from `ensemble.json`. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math

RELEASE = "https://github.com/mlmed/torchxrayvision/releases/download/v1"


@dataclasses.dataclass(frozen=True)
class Member:
    """One trained network, named as its weights in torchxrayvision.

    `architecture` is "densenet121" or "resnet50", `resolution` the height and width of the input in pixels.
    `thresholds` has the operating point of each class of the table, NaN for classes it was not trained on.
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
        """Name of its converted weights in the expert's folder."""
        return f"{self.name}.safetensors"


@dataclasses.dataclass(frozen=True)
class Table:
    """The whole ensemble.

    `classes` are the 18 findings, in the order of the networks' outputs. `reference_sets` maps a class to the
    members that VILA-M3 uses for it; other classes use all members.
    """

    classes: tuple[str, ...]
    members: tuple[Member, ...]
    reference_sets: dict[str, tuple[str, ...]]

    def includes(self, member: str, finding: str) -> bool:
        """Whether VILA-M3 uses `member` for the class `finding`."""
        members = self.reference_sets.get(finding)
        return members is None or member in members


@functools.cache
def load_table() -> Table:
    """Reads `ensemble.json`."""
    file = importlib.resources.files("vilam3_experts.xrv").joinpath("ensemble.json")
    stored = json.loads(file.read_text(encoding="utf-8"))
    members = tuple(
        Member(**{**row, "thresholds": tuple(math.nan if t is None else t for t in row["thresholds"])})
        for row in stored["members"]
    )
    sets = {finding: tuple(names) for finding, names in stored["reference_sets"].items()}
    return Table(tuple(stored["classes"]), members, sets)
