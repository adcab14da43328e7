"""Content keys of files that were read before: a run started again decodes no finished file.

Beside the store, on a disk, each writer has a file `inputs-RUN.known`: rows of 48 bytes, the first 16 of the
sha256 of (decoder version, how it is read, path, size and time of modification of every file) and the content
key. It holds no name. A row says only what key a file had; whether its answer is there, the store says. What
changed has no row, and is read. An unfinished row at the end is left out.

No rows have: inputs with notes, which are to be listed again; formats whose voxels may lie in another file;
object stores, where to ask for sizes takes as long as to read.
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
_KEPT = 10_000
_WHOLE = (".nii", ".nii.gz", ".mha", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm")


def fingerprint(item: Input) -> bytes | None:
    """What stands for the files of an input as they are now, 16 bytes; None if nothing may."""
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
        if not files[0][0].lower().endswith(_WHOLE):
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


class KnownInputs:
    """The rows of all files of a store, 48 bytes of memory each."""

    def __init__(self, store: paths.PathLike) -> None:
        """Reads them; there are none in an object store."""
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
        """The key of what the expert would look at; None if the input is to be read."""
        mark = fingerprint(item)
        if mark is None:
            return None
        first, second = np.frombuffer(mark, "<u8")
        at = int(np.searchsorted(self._first, first))
        while at < len(self._first) and self._first[at] == first:
            if self._rows["second"][at] == second:
                return self._rows["key"][at].tobytes().hex()
            at += 1
        return None


class KnownWriter:
    """Appends rows to a file of its own."""

    def __init__(self, store: paths.PathLike) -> None:
        """Makes no file until there are rows."""
        self._path = epath.Path(store) / f"inputs-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        self._remote = "://" in os.fspath(store)
        self._rows: list[bytes] = []

    def add(self, mark: bytes, key: str) -> None:
        """Adds a row; writes them when they are many."""
        if not self._remote:
            self._rows.append(mark + bytes.fromhex(key))
            if len(self._rows) >= _KEPT:
                self.flush()

    def flush(self) -> None:
        """Writes the rows. They may be there before the answers are.

        Raises:
          UserError: the disk is full, or the folder cannot be written.
        """
        if not self._rows:
            return
        try:
            with open(self._path, "ab") as file:
                # After an interrupted write the rows that follow would be out of step.
                file.truncate(file.tell() // _ROW.itemsize * _ROW.itemsize)
                file.write(b"".join(self._rows))
        except OSError as error:
            raise paths.write_error(self._path, error) from error
        self._rows = []
