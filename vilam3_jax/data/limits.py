"""Resource bounds of the readers for files from users."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds that readers enforce before doing the work in question."""

    file_bytes: int = 2 << 30  # size of a file; for a series, the sum over its files
    decoded_bytes: int = 4 << 30  # pixels or voxels of one input after decompression
    pixels: int = 64_000_000  # pixels of one image or DICOM frame
    voxels: int = 1 << 29  # voxels of one volume
    frames: int = 20_000  # frames of one multi-frame file or multi-page image
    files: int = 100_000  # files in one folder, including subfolders
    nesting: int = 16  # depth of DICOM sequences


DEFAULT_LIMITS = Limits()
