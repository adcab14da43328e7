"""The type of a fuzz seed, and the patient data planted in seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

SECRETS = ("Doe^Jane", "MRN-4711", "19480229", "Burgdorf")


@dataclasses.dataclass(frozen=True)
class Seed:
    """A valid input.

    Attributes:
      format: row of the summary table.
      name: unique name.
      kind: decides the entry points: "volume", "image", "dicom" or "folder".
      files: path relative to the input folder → content.
      entry: name of the file to open; "" opens the folder.
    """

    format: str
    name: str
    kind: str
    files: Mapping[str, bytes]
    entry: str


def single_file(format_: str, name: str, kind: str, data: bytes) -> Seed:
    return Seed(format_, name, kind, {name: data}, name)
