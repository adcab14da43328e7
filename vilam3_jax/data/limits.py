"""Bounds on what a file that a user hands us may cost."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """What readers refuse to exceed. Each bound is checked before the work that it limits.

    Attributes:
      file_bytes: size of a file; for a series, the sum over its files.
      decoded_bytes: pixels or voxels of one input after decompression.
      pixels: of one picture or one DICOM frame.
      voxels: of one volume.
      frames: of one multi-frame file or multi-page picture.
      files: looked at in one folder, subfolders included.
      nesting: depth of DICOM sequences.
    """

    file_bytes: int = 2 << 30
    decoded_bytes: int = 4 << 30
    pixels: int = 64_000_000
    voxels: int = 1 << 29
    frames: int = 20_000
    files: int = 100_000
    nesting: int = 16


DEFAULT_LIMITS = Limits()
