"""The folder of a run: its lock, and the list of skipped records."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence

from etils import epath

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import locks, paths, processes

CLAIM_FILE = ".running"
SKIPPED_FILE = "skipped_records.json"
WAIT_SECONDS = 120.0  # file servers keep the lock of a lost host for about as long

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(workdir: paths.PathLike) -> Iterator[None]:
    """Context in which no other run uses `workdir`; another run would delete this run's unfinished saves.

    The operating system releases the lock when the process ends. Object stores and some file systems have no
    locks; nothing is checked there.

    Raises:
      UserError: another run still has the lock after `WAIT_SECONDS`, or the folder is not writable.
    """
    folder = paths.as_path(workdir)
    with contextlib.ExitStack() as stack:
        if processes.is_primary_process() and "://" not in str(folder):
            file = _open(folder)
            stack.callback(os.close, file)
            _lock(file, folder)
        processes.host_barrier("claimed")
        yield


def _open(folder: epath.Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):
            return os.open(folder / CLAIM_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        return os.open(folder / CLAIM_FILE, os.O_RDONLY)  # another user's file; enough for a lock
    except OSError as error:
        raise paths.write_error(folder, error) from error


def _lock(file: int, folder: epath.Path) -> None:
    deadline, logged = time.monotonic() + WAIT_SECONDS, False
    while not locks.try_lock(file):
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: {holder} runs here; wait for it, stop it, or use another --workdir")
        if not logged:
            logger.info("%s: %s runs here; waiting for its end", folder, holder)
            logged = True
        time.sleep(1.0)
    with contextlib.suppress(OSError):  # the disk is full; the lock does not need the name
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} of {socket.gethostname()}".encode(), 0)


class SkippedRecords:
    """Records that the loaders of all processes skipped, with the reason, in `skipped_records.json`.

    The primary process has them in `records`, those before a restart included. A damaged file raises
    UserError.
    """

    def __init__(self, workdir: paths.PathLike) -> None:
        self._path = paths.as_path(workdir) / SKIPPED_FILE
        self._reported = 0
        self.records: dict[str, str] = {}
        if processes.is_primary_process() and self._path.exists():
            try:
                self.records = dict(json.loads(self._path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{self._path}: not readable ({error}); remove it") from error

    def add(self, skipped: Sequence[tuple[str, str]], missing: int = 0) -> dict[str, float]:
        """Adds new records; collective.

        Args:
          skipped: all (record, reason) of this process since its start.
          missing: requests that this process answered without their annotation since its start.

        Returns:
          The metrics `records_skipped` and `annotations_missing`, without zeros.
        """
        known = len(self.records)
        new, self._reported = skipped[self._reported :], len(skipped)
        lacking = 0
        for part, shown_without in processes.gather([new, missing]):
            self.records |= dict(part)
            lacking += shown_without
        if processes.is_primary_process() and len(self.records) > known:
            paths.write_text_atomic(self._path, json.dumps(self.records, indent=1) + "\n")
        figures = {"records_skipped": len(self.records), "annotations_missing": lacking}
        return {name: figure for name, figure in figures.items() if figure}
