"""Locks on files and folders, released by the operating system when their process ends."""

from __future__ import annotations

import filelock


def try_lock(descriptor: int) -> bool:
    """Locks an open file or folder for this process; False if another process has locked it.

    Closing the descriptor releases it. A file system without locks never refuses.
    """
    try:
        return filelock.lock_descriptor(descriptor, blocking=False)
    except OSError:
        return True
