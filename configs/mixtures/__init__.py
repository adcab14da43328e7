"""Named mixtures, one module each with a constant `MIXTURE`."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from vilam3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture.

    Attributes:
      stage: name of the recipe it is for.
      rows: (dataset or DATASET:RULE, epochs per pass), as in `data.mixture`.
    """

    stage: str
    rows: tuple[tuple[str, float], ...]


def known() -> list[str]:
    """Returns the names of all mixtures."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Mixture:
    """Returns a mixture by name.

    Raises:
      UserError: the name is unknown; lists the known ones.
    """
    if name not in known():
        raise UserError(
            f"config data.mixture: {name!r} is not a mixture; known ones are {', '.join(known())}; "
            "a row of a dataset is (NAME, WEIGHT)"
        )
    return importlib.import_module(f"{__name__}.{name}").MIXTURE


def rows_of(rows: Sequence[Any]) -> tuple[Any, ...]:
    """Expands the names of mixtures in `data.mixture` to rows.

    Raises:
      UserError: a name is unknown.
    """
    found: list[Any] = []
    for row in rows:
        found += get(row).rows if isinstance(row, str) else [row]
    return tuple(found)
