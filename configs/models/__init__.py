"""Model sizes as data: one module each, with `get_model()`."""

import importlib
import pkgutil

from ml_collections import ConfigDict

from vilam3_jax.errors import UserError


def get(name: str) -> ConfigDict:
    """Returns the `model` section of a size.

    Raises:
      UserError: there is no such size; lists those there are.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in known:
        raise UserError(f"model {name!r}: unknown; known sizes are {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}").get_model()
