"""Termination of child processes, by their parent or together with it."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kills `process` if the block takes longer, which unblocks a read or write; the event is then set."""
    timed_out = threading.Event()

    def expire() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield timed_out
    finally:
        timer.cancel()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a child process, closes its pipes and waits for its end."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        # Closing a pipe to a dead process fails if unsent bytes are buffered.
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.wait()


@functools.cache  # once per process
def end_with_parent() -> None:
    """Ends this `multiprocessing` child when its parent ends, even if the parent is killed.

    Otherwise the child would wait forever for work on a queue of which it holds both ends. Does nothing in a
    main process.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="vilam3-parent", daemon=True).start()
