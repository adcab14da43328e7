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
_STORES = {"gs": ("gcsfs", "pip install 'vilam3-jax[gcs]'"), "s3": ("s3fs", "pip install s3fs")}
_INSTEAD = {
    "http": "download it and give the local file",
    "https": "download it and give the local file",
    "hf": "download it with `hf download` and give the local folder",
    "gcs": "write gs:// instead",
    "s3a": "write s3:// instead",
}

# Errnos of transient disk, network or process failures, not of a bad file.
_TRANSIENT = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH"),
        *("ENETDOWN", "ENETUNREACH", "EMFILE", "ENFILE", "ENOMEM"),
    )
}
# TensorStore raises ValueErrors with the status of an object store or the errno of the operating system.
_TRANSIENT_STATUS = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|UNAUTHENTICATED")
_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'")


def as_path(path: PathLike) -> epath.Path:
    """Returns `path` as an `epath.Path`: `~` expanded, `..` resolved, and local paths absolute.

    Orbax accepts only absolute paths, and object stores take `..` for a name.

    Raises:
      UserError: an unsupported scheme, a scheme whose package is not installed, or a Windows path.
    """
    text = os.fspath(path)
    if match := _SCHEME.match(text):
        scheme, place = match[1].lower(), text[match.end() :]
        if scheme == "file":
            return epath.Path(os.path.abspath(urllib.parse.unquote(place.removeprefix("localhost"))))
        _check_store(text, scheme)
        _disable_listings_cache()
        return epath.Path(f"{scheme}://{posixpath.normpath(place)}")
    if match := _ONE_SLASH.match(text):
        raise UserError(f"{text}: {match[1]}: needs two slashes; give it as text, because pathlib drops one")
    if os.name != "nt" and _WINDOWS.match(text):
        raise UserError(f"{text}: a Windows path; give its path on this machine")
    return epath.Path(os.path.abspath(os.path.expanduser(text)))


def _check_store(text: str, scheme: str) -> None:
    if scheme not in _STORES:
        instead = _INSTEAD.get(scheme, "copy it to a local disk or to gs://")
        raise UserError(f"{text}: {scheme}:// is not supported; {instead}")
    package, install = _STORES[scheme]
    if not _is_installed(package):
        raise UserError(f"{text}: {scheme}:// needs the package {package}; {install}")


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _disable_listings_cache() -> None:
    """fsspec's cached listings would lack files that TensorStore or another host wrote."""
    with contextlib.suppress(ImportError):  # opening the path reports the missing package
        from fsspec import config

        for protocol in ("gcs", "gs", "s3"):
            config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def children(folder: PathLike) -> list[epath.Path]:
    """Sorted entries of `folder`; empty if it is missing or a file. Object stores have no empty folders."""
    try:
        return sorted(as_path(folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def exists(path: PathLike) -> bool:
    """Whether a file or folder exists; UserError if the store refuses to answer, as without credentials."""
    path = as_path(path)
    try:
        return path.exists()
    except Exception as error:  # object stores raise classes of their own
        check_passing(path, error)
        raise UserError(
            f"{path}: cannot be accessed ({type(error).__name__}); check the path and your access to it"
        ) from error


def file_size(path: PathLike) -> int:
    """Size of a file in bytes."""
    return _look_up(as_path(path))[1]


def _look_up(path: epath.Path) -> tuple[bool, int]:
    """(is it a folder, size), in one request to an object store."""
    if "://" in str(path):
        found = path.stat()
        return found.is_directory, found.length
    found = os.stat(path)  # epath's `stat` fails if the file's owner has no user name
    return stat.S_ISDIR(found.st_mode), found.st_size


def read_bytes(path: PathLike, max_bytes: int) -> bytes:
    """Reads a whole file; `max_bytes` keeps hostile files from exhausting memory.

    Raises:
      UserError: the file is missing, a folder, too large or unreadable.
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
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: an invalid file name
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        check_passing(path, error)
        raise UserError(f"{path}: cannot be read ({error}); check the path") from error


def check_passing(path: PathLike, error: Exception) -> None:
    """Raises UnavailableError if `error`, raised while reading `path`, is transient."""
    if passes(error):
        raise UnavailableError(
            f"{path}: cannot be read now ({error}); check the disk or the network and start again"
        ) from error


def passes(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is transient: the disk or the network fails, not the file."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if isinstance(error, ValueError):
            if _TRANSIENT_STATUS.match(str(error)):
                return True
            system = _OS_ERROR.search(str(error))
            code = system and int(system[1])
        if code in _TRANSIENT or isinstance(error, socket.gaierror):  # the latter: no name server
            return True
        error = error.__cause__ or error.__context__
    return False


def write_error(path: PathLike, error: Exception) -> UserError:
    """The error to raise if `path` cannot be written: UnavailableError if a restart may help."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    problem = f"{path}: cannot be written ({text.splitlines()[0][:300]})"
    if passes(error):
        return UnavailableError(f"{problem}; check the disk or the network and start again")
    return UserError(f"{problem}; free space or choose another folder")


def write_bytes_atomic(path: PathLike, data: bytes) -> None:
    """Writes `data` so that readers never see a partial file; creates missing folders.

    Raises:
      UserError: the disk is full or the folder is not writable.
      UnavailableError: the disk or the network fails.
    """
    _replace(as_path(path), data, durable=False)


def write_text_atomic(path: PathLike, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode())


def write_bytes_durable(path: PathLike, data: bytes) -> None:
    """`write_bytes_atomic` into an existing folder; on return the file survives a power cut."""
    path = as_path(path)
    _replace(path, data, durable="://" not in str(path))


def _replace(path: epath.Path, data: bytes, durable: bool) -> None:
    remote = "://" in str(path)  # an object appears only when it is complete
    temporary = path if remote else path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        if not durable:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        if durable:
            sync(temporary)
        if not remote:
            temporary.replace(path)
        if durable:
            sync(path.parent)
    except OSError as error:
        if not remote:
            with contextlib.suppress(OSError):  # the folder may be unwritable
                temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def sync(path: PathLike) -> None:
    """Waits until a local file, or the entries of a local folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
