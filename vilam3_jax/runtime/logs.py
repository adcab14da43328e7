"""Logging of commands: one line per message on stderr."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

LEVEL_VARIABLE = "VILAM3_LOG"  # such as DEBUG, which also logs why attention backends were not chosen
# Orbax logs errors that it also raises, with the stacks of all its threads.
_QUIET = ("absl",)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, also if it was replaced after the import."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


def configure() -> None:
    """Sends the package's messages to stderr, at the level of `VILAM3_LOG` (INFO); for commands only."""
    logger = logging.getLogger("vilam3_jax")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    level = logging.getLevelNamesMapping().get(os.environ.get(LEVEL_VARIABLE, "INFO").upper(), logging.INFO)
    logger.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
