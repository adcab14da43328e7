"""Errors that the user can fix, and warnings about what was assumed of an input."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


class UserError(Exception):
    """Bad input: one line that names the file, record or key, and what to do.

    Commands print the line without a traceback and exit with `exit_code`. Launchers start nothing again
    that ended with 2.
    """

    exit_code = 2


class UnavailableError(UserError):
    """A file of the data cannot be read now: a disk or a network fails. Starting again may help.

    No bad record that could be skipped: the run would go on without the rest of the file.
    """

    exit_code = 1


class StoppingError(UserError):
    """A record that the user's own settings do not allow to be skipped: it ends the run."""


class InputWarning(UserWarning):
    """Something about an input was assumed, repaired or skipped; the message names it and the file."""


_MAX_LISTED = 20


def listed(items: Sequence[str], most: int = _MAX_LISTED) -> str:
    """Joins differences for a message: `a; b; c`, and the number of those beyond `most`."""
    more = len(items) - most
    return "; ".join([*items[:most], *([f"and {more} more"] if more > 0 else [])])


def warn_of(notes: tuple[str, ...], source: object, *, stacklevel: int = 3) -> None:
    """Issues every note of a reader as an `InputWarning` that names the file."""
    for note in notes:
        warnings.warn(f"{source}: {note}", InputWarning, stacklevel=stacklevel)


_plain_format = warnings.formatwarning


def _one_line_notes(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, InputWarning):
        return f"note: {message}\n"
    return _plain_format(message, category, filename, lineno, line)


def use_one_line_notes() -> None:
    """Lets a command print each `InputWarning` as one line, without the source line that issued it."""
    warnings.formatwarning = _one_line_notes
