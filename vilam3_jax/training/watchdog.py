"""Dumps the stacks of all threads when a run stalls."""

from __future__ import annotations

import datetime
import faulthandler
import logging
import os
import tempfile
import threading
import time
from typing import Any

from vilam3_jax.runtime import paths

_CHECKS = 20  # of the clock, within the limit

logger = logging.getLogger(__name__)


class Watchdog:
    """Writes the stacks of all threads to `<workdir>/stacks-<process>.txt` if no beat comes for a while.

    The interpreter's own timer (`faulthandler`) makes the dump without the GIL, so it also shows a thread
    that hangs in a collective or a driver while holding it. The run continues.
    """

    def __init__(self, workdir: paths.PathLike, seconds: float, process: int = 0) -> None:
        """Starts watching; `seconds` without a beat are a stall, 0 for never."""
        self._seconds = seconds
        self._target = paths.as_path(workdir) / f"stacks-{process}.txt"
        self._beaten = time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if not seconds:
            return
        # The timer writes to a file descriptor, which object stores lack; their file is uploaded afterwards.
        self._remote = "://" in os.fspath(self._target)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile("w+") if self._remote else self._target.open("a")  # noqa: SIM115
        self._thread = threading.Thread(target=self._watch, name="vilam3-watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Records that the run advanced."""
        self._beaten = time.monotonic()

    def _watch(self) -> None:
        reported = None  # the beat after which a stall was reported
        pause = self._seconds / _CHECKS
        self._arm(self._seconds)
        while not self._closed.wait(pause):
            beaten = self._beaten
            quiet = time.monotonic() - beaten
            if quiet < self._seconds:
                self._arm(self._seconds - quiet)
            elif beaten != reported:
                reported = beaten
                self._report(quiet)

    def _arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(max(seconds, 0.001), file=self._file)

    def _report(self, quiet: float) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._file.write(f"--- {now}: no step for {quiet:.0f} s, stacks above\n\n")
        self._file.flush()
        if self._remote:
            self._file.seek(0)
            paths.write_text_atomic(self._target, self._file.read())
        logger.warning("no step for %.0f s; the stacks of all threads are in %s", quiet, self._target)

    def close(self) -> None:
        """Stops watching; removes an empty file."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if empty and not self._remote:
            self._target.unlink()
