"""The one error that is the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that names the file, record or key, and what to do.

    Commands print the line without a traceback and exit with code 2.
    """
