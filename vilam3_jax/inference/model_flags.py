"""Flags of `vilam3 chat`, `evaluate` and `serve` that say how the model is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from vilam3_jax.checkpoints.exports import LOADED_DTYPES
from vilam3_jax.models.kv_cache import CACHE_DTYPES


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument(
        "--dtype",
        choices=LOADED_DTYPES,
        help="type of weights and activations; int8: the LLM's matrices (default: the export's)",
    )
    parser.add_argument(
        "--cache_dtype",
        choices=CACHE_DTYPES,
        help="type of cached keys and values (default: that of activations)",
    )


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """The flags as arguments of `load` and `load_generator`."""
    return {name: getattr(options, name) for name in ("dtype", "cache_dtype")}
