"""Cache of content keys by file metadata, so that a restarted run decodes no finished file.

Each writer appends to its own file `inputs-RUN.known` in a local store: rows of 48 bytes. The first 16 bytes
are the start of the sha256 of (decoder version, read options, path, size and modification time of every
file), the other 32 are the content key. No names are stored. A row only maps a file to its key; the store
tells whether that key is annotated. A changed file has no row and is read again. A truncated last row is
ignored.

Not cached: inputs with notes, which must be listed again; formats whose voxels may be in another file; object
stores, where a metadata request takes as long as a read.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid

import numpy as np
from etils import epath

from vilam3_experts.inputs import Input
from vilam3_jax.data.content_keys import DECODER_VERSION
from vilam3_jax.runtime import paths

_SUFFIX = ".known"
_ROW = np.dtype([("first", "<u8"), ("second", "<u8"), ("key", "V32")])
_MAX_BUFFERED = 10_000
_SINGLE_FILE = (".nii", ".nii.gz", ".mha", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm")


def fingerprint(item: Input) -> bytes | None:
    """16 bytes that identify the current files of an input; None if it must not be cached."""
    digest = hashlib.sha256(f"{DECODER_VERSION}\0".encode())
    if item.notes or item.problem or not _add(digest, item):
        return None
    return digest.digest()[:16]


def _add(digest: hashlib._Hash, item: Input) -> bool:
    if item.parts:
        for role, part in item.parts:
            digest.update(f"{role}\0".encode())
            if not _add(digest, part):
                return False
        return True
    digest.update(f"{item.kind}\0{item.modality}\0{item.channel}\0".encode())
    if item.series is None:
        files = [(os.fspath(item.path), 0)]
        if not files[0][0].lower().endswith(_SINGLE_FILE):
            return False
    else:
        files = [(os.fspath(member.path), member.frame) for member in item.series.members]
    for path, frame in files:
        if "://" in path:
            return False
        try:
            found = os.stat(path)
        except OSError:
            return False
        digest.update(f"{os.path.abspath(path)}\0{frame}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return True


class KeyCache:
    """All cached rows of a store, 48 bytes of memory each."""

    def __init__(self, store: paths.PathLike) -> None:
        """Reads the rows; an object store has none."""
        folder = paths.as_path(store)
        rows = []
        if "://" not in os.fspath(folder) and folder.is_dir():
            for path in sorted(folder.glob(f"inputs-*{_SUFFIX}")):
                data = path.read_bytes()
                rows.append(np.frombuffer(data[: len(data) // _ROW.itemsize * _ROW.itemsize], _ROW))
        joined = np.concatenate(rows) if rows else np.empty(0, _ROW)
        self._rows = joined[np.argsort(joined["first"], kind="stable")]
        self._first = np.ascontiguousarray(self._rows["first"])

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, item: Input) -> str | None:
        """The content key of an input; None if the input must be read."""
        current = fingerprint(item)
        if current is None:
            return None
        first, second = np.frombuffer(current, "<u8")
        start, stop = (np.searchsorted(self._first, first, side) for side in ("left", "right"))
        rows = self._rows[start:stop]
        found = rows["key"][rows["second"] == second]
        return found[0].tobytes().hex() if len(found) else None


class KeyCacheWriter:
    """Appends rows to a new file, which is created with the first row."""

    def __init__(self, store: paths.PathLike) -> None:
        self._path = epath.Path(store) / f"inputs-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        self._remote = "://" in os.fspath(store)
        self._rows: list[bytes] = []

    def add(self, fingerprint: bytes, key: str) -> None:
        """Adds a row to the buffer, and flushes a full buffer."""
        if not self._remote:
            self._rows.append(fingerprint + bytes.fromhex(key))
            if len(self._rows) >= _MAX_BUFFERED:
                self.flush()

    def flush(self) -> None:
        """Writes the rows, possibly before the records they refer to; raises `UserError` if it cannot."""
        if not self._rows:
            return
        try:
            with open(self._path, "ab") as file:
                # Drop a row that an interrupted write truncated: it would misalign all later rows.
                file.truncate(file.tell() // _ROW.itemsize * _ROW.itemsize)
                file.write(b"".join(self._rows))
        except OSError as error:
            raise paths.write_error(self._path, error) from error
        self._rows = []
