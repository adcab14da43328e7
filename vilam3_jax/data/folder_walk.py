"""Recursive listing of the files in a folder."""

from __future__ import annotations

import collections
import dataclasses
import os
import stat
from collections.abc import Callable, Iterator

from etils import epath

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path

LINKED_FOLDER = "symbolic link to a folder, not followed"
BROKEN_LINK = "symbolic link that is broken"
SPECIAL = "pipe, socket or device, not opened"
CLOSED_FOLDER = "folder that cannot be read; check its permissions"


@dataclasses.dataclass
class Listing:
    """The contents of a folder."""

    files: list[str]  # paths of regular files, including targets of symbolic links; sorted folder by folder
    skipped: collections.Counter[str]  # reason -> number of other entries, and of unreadable folders


def list_files(folder: PathLike, max_files: int, tick: Callable[[], object]) -> Listing:
    """Lists the files of a local or remote folder and its subfolders, hidden ones included.

    Symbolic links to folders are not followed: they may form loops and count a folder twice. `tick` is
    called for each file. Raises `UserError` for no folder, no permission, or more than `max_files` files.
    """
    root = as_path(folder)
    remote = "://" in str(root)
    if not remote:
        _check_root(str(root))
    listing = Listing([], collections.Counter())
    for path in _remote(root) if remote else _local(str(root), listing.skipped):
        listing.files.append(path)
        tick()
        if len(listing.files) > max_files:
            raise UserError(f"{folder}: more than {max_files} files; give its subfolders one by one")
    if remote and not listing.files:
        raise UserError(f"{folder}: no such folder, or nothing in it; check the path")
    return listing


def _check_root(root: str) -> None:
    try:
        os.scandir(root).close()
    except NotADirectoryError:
        raise UserError(f"{root}: is a file; give the folder that holds it") from None
    except FileNotFoundError:
        raise UserError(f"{root}: no such folder; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or "invalid name"
        raise UserError(f"{root}: cannot be listed ({reason}); check its permissions") from error


def _local(root: str, skipped: collections.Counter[str]) -> Iterator[str]:
    waiting = [root]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            skipped[CLOSED_FOLDER] += 1
            continue
        folders = []
        for entry in entries:
            try:
                mode = entry.stat().st_mode  # follows links
            except OSError:
                skipped[BROKEN_LINK if entry.is_symlink() else "vanished during the scan"] += 1
                continue
            if stat.S_ISREG(mode):
                yield entry.path
            elif not stat.S_ISDIR(mode):
                skipped[SPECIAL] += 1
            elif entry.is_symlink():
                skipped[LINKED_FOLDER] += 1
            else:
                folders.append(entry.path)
        waiting += reversed(folders)


def _remote(root: epath.Path) -> Iterator[str]:
    scheme = str(root).partition("://")[0]
    for folder, folders, names in root.walk():
        folders.sort()
        place = str(folder)
        if "://" not in place:  # fsspec omits the scheme
            place = f"{scheme}://{place.lstrip('/')}"
        for name in sorted(names):
            if name:  # object stores may list a marker for the folder itself
                yield f"{place}/{name}"
