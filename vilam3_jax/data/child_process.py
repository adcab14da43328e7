"""How child processes end: by their parent, or with it.

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
    """Ends a child process and closes its pipes."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        # A pipe to a dead process may still hold bytes that nobody will take.
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.wait()


@functools.cache  # once a process
def end_with_parent() -> None:
    """Lets a process of `multiprocessing` end when its parent does, even where that was killed.

    Such a process waits for work in a queue of which it holds both ends, so it would wait forever. Does
    nothing in a main process.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="vilam3-parent", daemon=True).start()
