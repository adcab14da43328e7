"""Resource bounds of the readers for files from users."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds that readers enforce before doing the work in question.

    Attributes:
      file_bytes: size of a file; for a series, the sum over its files.
      decoded_bytes: pixels or voxels of one input after decompression.
      pixels: pixels of one image or DICOM frame.
      voxels: voxels of one volume.
      frames: frames of one multi-frame file or multi-page image.
      files: files in one folder, including subfolders.
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
