"""XProf traces of the configured steps, and of the next few after SIGUSR1."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

import jax

from vilam3_jax.runtime import paths

FOLDER = "profile"
_ON_SIGNAL = 3  # steps traced after a signal

logger = logging.getLogger(__name__)


class Traces:
    """Starts and stops the profiler between steps; traces go to `<workdir>/profile`, one per process.

    A trace that cannot be made or written is logged, and the run continues.
    """

    def __init__(self, workdir: paths.PathLike, steps: tuple[int, ...]) -> None:
        """Traces steps `steps[0]` to `steps[1]`, both included; empty: only on SIGUSR1."""
        self._folder = os.fspath(paths.as_path(workdir) / FOLDER)
        self._steps = steps
        self._last: int | None = None  # last step of the running trace
        self._asked = threading.Event()
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGUSR1, lambda *_: self._asked.set())

    def before(self, step: int) -> None:
        """Called before a step is dispatched."""
        if self._last is not None:
            return
        if self._steps and step == self._steps[0]:
            self._start(self._steps[1])
        elif self._asked.is_set():
            self._asked.clear()
            self._start(step + _ON_SIGNAL - 1)

    def due(self, step: int) -> bool:
        """Whether the trace ends with this step; the caller waits for the device, then calls `stop`."""
        return self._last is not None and step >= self._last

    def _start(self, last: int) -> None:
        try:
            jax.profiler.start_trace(self._folder)
            self._last = last
        except Exception as error:  # whatever the profiler and its file system raise
            self._report(error)

    def stop(self) -> None:
        """Ends and writes the running trace, if any."""
        if self._last is not None:
            self._last = None
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                self._report(error)

    def _report(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:300]
        logger.warning("%s: no trace (%s); training continues", self._folder, reason)

    def close(self) -> None:
        """Writes a running trace and restores the signal handler."""
        self.stop()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)
