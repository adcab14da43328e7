"""Packages that only some metrics need, imported when used."""

from __future__ import annotations

import importlib
from typing import Any

from vilam3_jax.errors import UserError


def package(name: str, extra: str, purpose: str) -> Any:
    """The module `name`, which the extra `extra` of vilam3-jax installs.

    Raises:
      UserError: it is not installed; the message names `purpose` and the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise UserError(
            f"{purpose} needs {top}, which cannot be imported ({error}): pip install 'vilam3-jax[{extra}]'"
        ) from error
