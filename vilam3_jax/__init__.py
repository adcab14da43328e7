"""VILA-M3 in JAX: a medical vision-language model that asks domain experts for help.

The package is lazy: importing it imports neither jax nor flax, so that the expert processes can use its
record, image and volume modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vilam3_jax.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]

if TYPE_CHECKING:
    from vilam3_jax.inference.assistant import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from vilam3_jax.inference.assistant import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
