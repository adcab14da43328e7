"""Local and object-store paths. Nothing else in the package opens a path that a user gave."""

from __future__ import annotations

import contextlib
import os
import uuid

from etils import epath

from vilam3_jax.errors import UserError

PathLike = str | os.PathLike[str]


def as_path(path: PathLike) -> epath.Path:
    """Returns `path` as an `epath.Path`: `~` expanded, local paths absolute, object stores as they are.

    Absolute, because Orbax takes nothing else.
    """
    text = os.fspath(path)
    return epath.Path(text) if "://" in text else epath.Path(os.path.abspath(os.path.expanduser(text)))


def file_size(path: PathLike) -> int:
    """Size of a file in bytes, also where the owner of a local file has no name (epath's `stat` fails)."""
    path = as_path(path)
    return path.stat().length if "://" in str(path) else os.stat(path).st_size


def read_bytes(path: PathLike, max_bytes: int) -> bytes:
    """Reads a whole file.

    Args:
      path: file to read.
      max_bytes: refuse larger files, so that a hostile file cannot exhaust memory.

    Raises:
      UserError: missing, a folder, or larger than `max_bytes`.
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, a file was expected")
    size = file_size(path)
    if size > max_bytes:
        raise UserError(f"{path}: {size} bytes, more than the limit of {max_bytes}; use a smaller file")
    return path.read_bytes()


def write_bytes_atomic(path: PathLike, data: bytes) -> None:
    """Writes `data` beside `path`, then renames: a reader never sees half a file.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    path = as_path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what cannot be written
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from error


def write_text_atomic(path: PathLike, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode())
