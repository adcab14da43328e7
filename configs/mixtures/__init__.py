"""Mixtures as data: one module each, with `MIXTURE`. A row is a dataset and its epochs in a pass."""

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
      stage: the stage it is for, a recipe's name.
      rows: (dataset, or DATASET:RULE; epochs of it in a pass), as `data.mixture` has them.
    """

    stage: str
    rows: tuple[tuple[str, float], ...]


def known() -> list[str]:
    """Names of the mixtures."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Mixture:
    """Returns a mixture.

    Raises:
      UserError: an unknown name; lists those there are.
    """
    if name not in known():
        raise UserError(
            f"config data.mixture: {name!r} is no mixture; known ones are {', '.join(known())}; "
            "a row of a dataset is (NAME, WEIGHT)"
        )
    return importlib.import_module(f"{__name__}.{name}").MIXTURE


def rows_of(rows: Sequence[Any]) -> tuple[Any, ...]:
    """The rows of `data.mixture`, with those of a mixture in the place of its name.

    Raises:
      UserError: an unknown name.
    """
    found: list[Any] = []
    for row in rows:
        found += get(row).rows if isinstance(row, str) else [row]
    return tuple(found)
