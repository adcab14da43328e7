"""What child processes that answer over pipes have in common.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import contextlib
import subprocess


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a child process and closes its pipes."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        # A pipe to a dead process may still hold bytes that nobody will take.
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.wait()
