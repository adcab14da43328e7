"""Local and object-store paths. Nothing else in the package opens a path that a user gave."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import os
import posixpath
import re
import socket
import stat
import urllib.parse
import uuid

from etils import epath

from vilam3_jax.errors import UnavailableError, UserError

PathLike = str | os.PathLike[str]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_SLASH = re.compile(r"(gs|s3|https?|hdfs|az|hf):/")  # pathlib.Path("gs://...") drops the other
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# Object stores: the package that opens them, and how to install it.
_STORES = {
    "gs": ("gcsfs", "pip install 'vilam3-jax[gcs]'"),
    "s3": ("s3fs", "pip install s3fs"),
}
_INSTEAD = {
    "http": "download it and give the local file",
    "https": "download it and give the local file",
    "hf": "download it with `hf download` and give the local folder",
    "gcs": "write gs:// instead",
    "s3a": "write s3:// instead",
}

# What says something of the disk, the network or this process, and nothing of the file.
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}
# The same of TensorStore, which has ValueErrors: of an object store's answers, and of the operating system.
_PASSING_STATUS = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|UNAUTHENTICATED")
_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'")


def as_path(path: PathLike) -> epath.Path:
    """Returns `path` as an `epath.Path`: `~` expanded, without `..`, and local paths absolute.

    Absolute, because Orbax takes nothing else; without `..`, because to an object store that is a name.

    Raises:
      UserError: a scheme that is not read here, or whose package is missing; a Windows path.
    """
    text = os.fspath(path)
    if match := _SCHEME.match(text):
        scheme, place = match[1].lower(), text[match.end() :]
        if scheme == "file":
            return epath.Path(os.path.abspath(urllib.parse.unquote(place.removeprefix("localhost"))))
        _check_store(text, scheme)
        _always_list_anew()
        return epath.Path(f"{scheme}://{posixpath.normpath(place)}")
    if match := _ONE_SLASH.match(text):
        raise UserError(f"{text}: {match[1]}: needs two slashes; give it as text, because pathlib drops one")
    if os.name != "nt" and _WINDOWS.match(text):
        raise UserError(f"{text}: a Windows path; give the path that this machine has for it")
    return epath.Path(os.path.abspath(os.path.expanduser(text)))


def _check_store(text: str, scheme: str) -> None:
    if scheme not in _STORES:
        instead = _INSTEAD.get(scheme, "copy it to a local disk or to gs://")
        raise UserError(f"{text}: {scheme}:// is not read here; {instead}")
    package, install = _STORES[scheme]
    if not _is_installed(package):
        raise UserError(f"{text}: {scheme}:// needs the package {package}; {install}")


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _always_list_anew() -> None:
    """What TensorStore or another host wrote would be missing in the listings that fsspec keeps."""
    try:
        from fsspec import config
    except ImportError:
        return  # opening the path says what to install
    for protocol in ("gcs", "gs", "s3"):
        config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def children(folder: PathLike) -> list[epath.Path]:
    """What lies in `folder`, by name; nothing if it is no folder.

    An object store has no empty folders, so one that was just made may be missing there.
    """
    try:
        return sorted(as_path(folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def exists(path: PathLike) -> bool:
    """Whether a file or folder is there.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: the object store does not say, for example because it asks for credentials.
    """
    path = as_path(path)
    try:
        return path.exists()
    except Exception as error:  # object stores raise classes of their own
        check_passing(path, error)
        raise UserError(
            f"{path}: cannot be looked up ({type(error).__name__}); check the path and your access to it"
        ) from error


def file_size(path: PathLike) -> int:
    """Size of a file in bytes."""
    return _look_up(as_path(path))[1]


def _look_up(path: epath.Path) -> tuple[bool, int]:
    """Whether `path` is a folder, and its size: one request to an object store."""
    if "://" in str(path):
        found = path.stat()
        return found.is_directory, found.length
    known = os.stat(path)  # epath's fails where the owner of a file has no name
    return stat.S_ISDIR(known.st_mode), known.st_size


def read_bytes(path: PathLike, max_bytes: int) -> bytes:
    """Reads a whole file.

    Args:
      path: file to read.
      max_bytes: refuse larger files, so that a hostile file cannot exhaust memory.

    Raises:
      UserError: missing, a folder, larger than `max_bytes`, or not to be read.
      UnavailableError: the disk or the network fails.
    """
    path = as_path(path)
    try:
        is_folder, size = _look_up(path)
        if is_folder:
            raise UserError(f"{path}: is a folder, a file was expected")
        if size > max_bytes:
            raise UserError(f"{path}: {size} bytes, more than the limit of {max_bytes}; use a smaller file")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last: no name for a file
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        check_passing(path, error)
        raise UserError(f"{path}: cannot be read ({error}); check the path") from error


def check_passing(path: PathLike, error: Exception) -> None:
    """Tells a disk or a network that fails from a damaged file.

    Raises:
      UnavailableError: `error`, met while `path` was read, says nothing of the file.
    """
    if passes(error):
        raise UnavailableError(
            f"{path}: cannot be read now ({error}); check the disk or the network and start again"
        ) from error


def passes(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says nothing of the file: a disk or a network fails."""
    while error is not None:
        if isinstance(error, socket.gaierror) or (isinstance(error, OSError) and error.errno in _PASSING):
            return True  # the former: no name server
        if isinstance(error, ValueError):
            system = _OS_ERROR.search(str(error))
            if _PASSING_STATUS.match(str(error)) or (system and int(system[1]) in _PASSING):
                return True
        error = error.__cause__ or error.__context__
    return False


def write_error(path: PathLike, error: Exception) -> UserError:
    """What to raise where `path` cannot be written: an `UnavailableError` if starting again may help."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    told = f"{path}: cannot be written ({text.splitlines()[0][:300]})"
    if passes(error):
        return UnavailableError(f"{told}; check the disk or the network and start again")
    return UserError(f"{told}; free space or choose another folder")


def write_bytes_atomic(path: PathLike, data: bytes) -> None:
    """Writes `data` so that a reader never sees half a file.

    Beside `path`, then renamed; an object store shows an object when it is whole.

    Raises:
      UserError: the disk is full or the folder cannot be written.
      UnavailableError: the disk or the network fails.
    """
    path = as_path(path)
    remote = "://" in str(path)
    temporary = path if remote else path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        if not remote:
            temporary.replace(path)
    except OSError as error:
        if not remote:
            with contextlib.suppress(OSError):  # the folder itself may be what cannot be written
                temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_text_atomic(path: PathLike, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode())


def write_bytes_durable(path: PathLike, data: bytes) -> None:
    """`write_bytes_atomic` that returns when file and name are on the disk, power cut or not.

    Raises:
      UserError, UnavailableError: as `write_bytes_atomic`.
    """
    path = as_path(path)
    if "://" in str(path):
        write_bytes_atomic(path, data)
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def sync(path: PathLike) -> None:
    """Waits until a local file, or the names in a local folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
