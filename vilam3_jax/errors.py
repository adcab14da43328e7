"""The one error that is the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that names the file, record or key, and what to do.

    Commands print the line without a traceback and exit with `exit_code`. Launchers start nothing again
    that ended with 2.
    """

    exit_code = 2


class UnavailableError(UserError):
    """A file of the data cannot be read now: a disk or a network fails. Starting again may help.

    No bad record that could be put aside: the run would go on without the rest of the file.
    """

    exit_code = 1
