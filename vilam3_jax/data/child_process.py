"""Termination of child processes, by their parent or together with it.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import subprocess
import threading


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
