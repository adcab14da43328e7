"""Cheap digests of image files, to detect changed files.

A digest covers the size of a file and three blocks of it. Images and volumes are usually compressed, so a
changed pixel changes the data after it or a final checksum. In an uncompressed file, a change between the
blocks that keeps the size goes undetected. Modification times are ignored: copying changes them.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Sequence

from etils import epath

from vilam3_jax.runtime import paths

_BLOCK = 1 << 16
_THREADS = 16
MISSING = "missing"


def digests(files: Sequence[epath.Path]) -> list[str]:
    """`digest` of every file, in parallel."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(digest, files))


def digest(path: epath.Path) -> str:
    """The digest of a file, or of the listing of a folder such as a DICOM series: 24 hexadecimal digits.

    `MISSING` if there is no such file; raises `UnavailableError` if the disk or the network fails.
    """
    try:
        if path.is_dir():
            found = hashlib.blake2b(digest_size=12)
            for child in sorted(paths.children(path), key=lambda child: child.name):
                found.update(f"{child.name}/{paths.file_size(child)}\n".encode())
            return found.hexdigest()
        return _file_digest(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return MISSING
    except OSError as error:
        paths.check_passing(path, error)
        return MISSING


def _file_digest(path: epath.Path) -> str:
    size = paths.file_size(path)
    found = hashlib.blake2b(str(size).encode(), digest_size=12)
    with path.open("rb") as file:
        if size <= 3 * _BLOCK:
            found.update(file.read())
            return found.hexdigest()
        for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
            file.seek(start)
            found.update(file.read(_BLOCK))
    return found.hexdigest()
