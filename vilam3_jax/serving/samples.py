"""Sample images of a folder, which the page offers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vilam3_jax.errors import UserError

_MAX_SAMPLES = 200


@dataclasses.dataclass(frozen=True)
class Sample:
    """A file that FileStore accepts: an image, a volume, or a zip of one DICOM series."""

    name: str  # of the file, without its suffixes
    path: Path

    def describe(self, number: int) -> dict[str, Any]:
        """What clients learn of it."""
        return {"id": f"sample-{number}", "name": self.name}


def samples_of(folder: str) -> tuple[Sample, ...]:
    """The files of a folder, in the order of their names.

    Raises:
      UserError: no such folder, or no files or too many in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--samples={folder}: no such folder")
    files = sorted(one for one in root.iterdir() if one.is_file() and not one.name.startswith("."))
    if not files:
        raise UserError(f"--samples={folder}: holds no files; copy a few images into it")
    if len(files) > _MAX_SAMPLES:
        raise UserError(
            f"--samples={folder}: holds {len(files)} files, more than {_MAX_SAMPLES}; choose a few"
        )
    return tuple(Sample(one.name.partition(".")[0], one) for one in files)
