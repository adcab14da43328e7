"""Uploaded files: random names in a private folder, deleted after a while and when the server stops."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import IO, Any

from vilam3_jax.data import file_kinds
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.serving.errors import ApiError, bad_request

_CHUNK = 1 << 20
_ZIP = b"PK\x03\x04"
_MAX_MEMBERS = 5_000
_MAX_UNPACKED = 4 << 30
_MAX_RATIO = 200  # unpacked to packed bytes; deflated scans reach 10, bombs 1000
_RATIO_FROM = 16 << 20  # unpacked bytes from which the ratio is checked
_SKIPPED = re.compile(r"(^|/)__MACOSX/|(^|/)(\.[^/]*|DICOMDIR|Thumbs\.db)$", re.IGNORECASE)
_ID = re.compile(r"file-[A-Za-z0-9_-]{32}")
_NAME = "scan"  # of every stored file, in messages and descriptions
_VIEW_BYTES = 1 << 29
_MAX_FILES = 10_000  # small ones take memory, too
_LONGEST_REQUEST = 3600.0  # seconds, after which files of one request were left by a client that went


@dataclasses.dataclass(eq=False)
class StoredFile:
    """An uploaded file.

    Attributes:
      id: what clients call it.
      path: the file, or a folder with the files of a zip.
      size: bytes that were uploaded.
      kind: for people, such as "NIfTI volume".
      owner: who may use it.
      created: Unix time.
      expires: Unix time of its deletion.
      shown: what the page shows of it, see `viewing.Viewer`, or None; dies with the file.
      deleted: whether the file is gone.
    """

    id: str
    path: Path
    size: int
    kind: str
    owner: str
    created: float
    expires: float
    shown: Any = None
    deleted: bool = False


class Views:
    """What was read of files, by options, up to some bytes; thread-safe. It dies with its file."""

    def __init__(self, max_bytes: int = _VIEW_BYTES):
        """The views that were used first go beyond `max_bytes`."""
        self._max_bytes, self._bytes = max_bytes, 0
        self._found: collections.OrderedDict[tuple[str, Hashable], tuple[Any, int]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def get(self, stored: StoredFile, key: Hashable) -> Any:
        """What was kept, or None."""
        with self._lock:
            found = self._found.get((stored.id, key))
            if found is None:
                return None
            self._found.move_to_end((stored.id, key))
            return found[0]

    def keep(self, stored: StoredFile, key: Hashable, view: Any, size: int) -> None:
        """Remembers a view of `size` bytes, unless it is too large or its file is gone."""
        with self._lock:
            if stored.deleted or size > self._max_bytes or (stored.id, key) in self._found:
                return
            self._found[stored.id, key] = view, size
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._found)))

    def forget(self, stored: StoredFile) -> None:
        """Forgets the views of a file that is deleted."""
        with self._lock:
            stored.deleted = True
            for name in [name for name in self._found if name[0] == stored.id]:
                self._drop(name)

    def _drop(self, name: tuple[str, Hashable]) -> None:
        self._bytes -= self._found.pop(name)[1]


class FileStore:
    """Files of clients; thread-safe. Close it, or use it in a `with` statement."""

    def __init__(self, *, seconds: float = 3600.0, max_bytes: int = 1 << 29, space: int = 8 << 30):
        """Makes the folder.

        Args:
          seconds: files are deleted this long after their upload.
          max_bytes: limit of one file.
          space: limit of all files, unpacked.
        """
        self.max_bytes = max_bytes
        self.views = Views()
        self._seconds, self._space = seconds, space
        self._root = Path(tempfile.mkdtemp(prefix="vilam3-files-"))  # for this user alone
        self._files: dict[str, StoredFile] = {}
        self._sizes: dict[str, int] = {}
        self._begun: dict[str, float] = {}  # also of files that were never finished
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def add(self, source: IO[bytes], owner: str) -> StoredFile:
        """Stores a file, or the files of a zip.

        Raises:
          ApiError: too large, no space, a zip that is damaged or a bomb, or no image or volume.
        """
        token, folder = self._begin()
        try:
            path = folder / _NAME
            size = self._copy(token, source, path, self.max_bytes)
            with path.open("rb") as file:
                is_zip = file.read(len(_ZIP)) == _ZIP
            if is_zip:
                packed = path.rename(folder / "zip")
                path = self._unpack(token, packed, size)
                packed.unlink()
                self._sizes[token] -= size
            kind = "folder of files" if path.is_dir() else self._kind(path)
        except BaseException as error:
            self._remove(token)
            if isinstance(error, OSError):
                raise _cannot_store() from error
            if isinstance(error, UnavailableError):
                raise UnavailableError(self.without_paths(str(error))) from None
            if isinstance(error, UserError) and not isinstance(error, ApiError):
                raise bad_request(self.without_paths(str(error)), "file", "unusable_file") from None
            raise
        now = time.time()
        stored = StoredFile(f"file-{token}", path, size, kind, owner, now, now + self._seconds)
        with self._lock:
            self._files[stored.id] = stored
        return stored

    @contextlib.contextmanager
    def for_one_request(self, data: bytes) -> Iterator[Path]:
        """A file that exists until the block ends; raises as `add`."""
        token, folder = self._begin()
        try:
            self._reserve(token, len(data))
            path = folder / _NAME
            try:
                path.write_bytes(data)
            except OSError as error:
                raise _cannot_store() from error
            yield path
        finally:
            self._remove(token)

    def get(self, file_id: str, owner: str) -> StoredFile:
        """A file of an owner; raises `ApiError` (404) without one."""
        with self._lock:
            found = self._files.get(file_id) if _ID.fullmatch(file_id) else None
        if found is None or found.owner != owner or found.expires < time.time():
            raise ApiError(
                404, "no such file; it was never uploaded or it expired, upload it again", "no_such_file"
            )
        return found

    def delete(self, file_id: str, owner: str) -> None:
        """Deletes a file; raises as `get`."""
        self._drop(self.get(file_id, owner))

    def sweep(self) -> None:
        """Deletes what expired."""
        now = time.time()
        with self._lock:
            expired = [one for one in self._files.values() if one.expires < now]
            tokens = {stored.id.removeprefix("file-") for stored in self._files.values()}
            lost = [
                token
                for token, begun in self._begun.items()
                if token not in tokens and begun + max(self._seconds, _LONGEST_REQUEST) < now
            ]
        for stored in expired:
            self._drop(stored)
        for token in lost:
            self._remove(token)

    def without_paths(self, message: str) -> str:
        """A message in which no path of the store occurs."""
        return re.sub(re.escape(str(self._root)) + r"/[\w-]+(?:/[\w.]+)*", "the file", message)

    def close(self) -> None:
        """Deletes everything."""
        with self._lock:
            self._files.clear()
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> FileStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> tuple[str, Path]:
        """A new name and its folder."""
        token = secrets.token_urlsafe(24)
        folder = self._root / token
        with self._lock:
            if len(self._begun) >= _MAX_FILES:
                raise _no_space("the server has too many files")
            self._begun[token] = time.time()
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            self._remove(token)
            raise _cannot_store() from error
        return token, folder

    def _drop(self, stored: StoredFile) -> None:
        with self._lock:
            self._files.pop(stored.id, None)
        self.views.forget(stored)
        stored.shown = None
        self._remove(stored.id.removeprefix("file-"))

    def _remove(self, token: str) -> None:
        with self._lock:
            self._sizes.pop(token, None)
            self._begun.pop(token, None)
        shutil.rmtree(self._root / token, ignore_errors=True)

    def _reserve(self, token: str, count: int) -> None:
        """Counts bytes before they are written."""
        with self._lock:
            if sum(self._sizes.values()) + count > self._space:
                raise _no_space("the server's space for uploads is full")
            self._sizes[token] = self._sizes.get(token, 0) + count

    def _copy(self, token: str, source: IO[bytes], path: Path, limit: int) -> int:
        """Writes at most `limit` bytes; returns their number."""
        size = 0
        with path.open("xb") as sink:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > limit:
                    raise ApiError(
                        413, f"the file is larger than {limit >> 20} MiB", "too_large", param="file"
                    )
                self._reserve(token, len(chunk))
                sink.write(chunk)
        return size

    def _unpack(self, token: str, packed: Path, packed_size: int) -> Path:
        """Writes the members of a zip under numbers, because their names may lead anywhere."""
        try:
            with zipfile.ZipFile(packed) as archive:
                members = [
                    one
                    for one in archive.infolist()
                    if not one.is_dir() and not _SKIPPED.search(one.filename)
                ]
                if not members:
                    raise bad_request("the zip holds no files; zip the files of one series", "file")
                if len(members) > _MAX_MEMBERS:
                    raise bad_request(f"the zip holds more than {_MAX_MEMBERS} files; zip one series", "file")
                folder = packed.parent / _NAME
                folder.mkdir(mode=0o700)
                left = min(_MAX_UNPACKED, max(_RATIO_FROM, packed_size * _MAX_RATIO))
                for number, member in enumerate(members):
                    if member.flag_bits & 1:
                        raise bad_request("the zip is encrypted; zip it without a password", "file")
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise bad_request("the zip uses a rare compression; zip it with deflate", "file")
                    with archive.open(member) as source:
                        left -= self._member(token, source, folder / f"{number:05d}", left)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            ValueError,
            NotImplementedError,
            OSError,
            RuntimeError,
        ) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise bad_request("the zip is damaged; zip the files again", "file", "unusable_file") from None
        if len(members) == 1:
            alone = (folder / "00000").rename(packed.parent / "alone")
            folder.rmdir()
            return alone.rename(folder)
        return folder

    def _member(self, token: str, source: IO[bytes], path: Path, left: int) -> int:
        try:
            return self._copy(token, source, path, left)
        except ApiError as error:
            if error.code != "too_large":
                raise
            raise bad_request(
                "the zip unpacks to far more than its size; zip one series", "file", "too_large"
            ) from None

    @staticmethod
    def _kind(path: Path) -> str:
        kind = file_kinds.identify(path)
        if kind.reader is None:
            raise file_kinds.refusal(path, kind)
        return kind.name


def _cannot_store() -> UnavailableError:
    return UnavailableError("the server cannot store files now; tell who runs it")


def _no_space(problem: str) -> ApiError:
    return ApiError(429, f"{problem}; delete files, or try again later", "no_space", retry=60)


def file_object(stored: StoredFile) -> dict[str, Any]:
    """A file in OpenAI's form."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.size,
        "created_at": int(stored.created),
        "expires_at": int(stored.expires),
        "filename": os.path.basename(stored.path),
        "purpose": "vision",
        "status": "processed",
        "vilam3": {"kind": stored.kind},
    }
