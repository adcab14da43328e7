"""Says what every thread is doing when a run no longer moves."""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
import tempfile
import threading
import time
from typing import Any

from vilam3_jax.runtime import paths

_LOOKS = 20  # times within the limit that the clock is looked at


class Watchdog:
    """Writes the stacks of all threads to `<workdir>/stacks-<process>.txt` when no beat came for a while.

    The dump is made by a timer of the interpreter's own (`faulthandler`), which needs no lock of Python's: a
    thread that hangs in a collective or a driver and holds that lock is shown, too. The run is left alone.
    """

    def __init__(self, workdir: paths.PathLike, seconds: float, process: int = 0) -> None:
        """Starts watching; `seconds` without a beat are a stall, 0 never."""
        self._seconds = seconds
        self._target = paths.as_path(workdir) / f"stacks-{process}.txt"
        self._beaten = time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if not seconds:
            return
        # The timer writes to a file descriptor; an object store has none, so its file is sent afterwards.
        self._remote = "://" in os.fspath(self._target)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile("w+") if self._remote else self._target.open("a")  # noqa: SIM115
        self._thread = threading.Thread(target=self._watch, name="vilam3-watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """The run moved."""
        self._beaten = time.monotonic()

    def _watch(self) -> None:
        said = None  # of which beat; the first steps can stall as well
        pause = self._seconds / _LOOKS
        self._arm(self._seconds)
        while not self._closed.wait(pause):
            beaten = self._beaten
            quiet = time.monotonic() - beaten
            if quiet < self._seconds:
                self._arm(self._seconds - quiet)
            elif beaten != said:
                said = beaten
                self._say(quiet)

    def _arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(max(seconds, 0.001), file=self._file)

    def _say(self, quiet: float) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._file.write(f"--- {now}: no step for {quiet:.0f} s, stacks above\n\n")
        self._file.flush()
        if self._remote:
            self._file.seek(0)
            paths.write_text_atomic(self._target, self._file.read())
        print(f"no step for {quiet:.0f} s; the stacks of all threads are in {self._target}", file=sys.stderr)

    def close(self) -> None:
        """Stops watching; a file in which nothing was written is removed."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if empty and not self._remote:
            self._target.unlink()
