"""Flags of `vilam3 chat`, `evaluate` and `serve` that say how the model is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from vilam3_jax.checkpoints.exports import LOADED_DTYPES
from vilam3_jax.models.kv_cache import CACHE_DTYPES
from vilam3_jax.runtime import process_flags

CHECKPOINT_HELP = (
    "a training run, one of its checkpoints (RUN/checkpoints/STEP), an export, or a Hugging Face folder of "
    "VILA, VILA-M3 or NVILA"
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, and those of several processes."""
    parser.add_argument(
        "--mesh",
        metavar="tensor=N",
        help="devices that share the model; tensor=-1 for all (default: one device)",
    )
    parser.add_argument(
        "--dtype",
        choices=LOADED_DTYPES,
        help="type of weights and activations; int8: the LLM's matrices (default: the model's)",
    )
    parser.add_argument(
        "--cache_dtype",
        choices=CACHE_DTYPES,
        help="type of cached keys and values (default: that of activations)",
    )
    process_flags.add_arguments(parser)


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """The flags as arguments of `load` and `load_generator`."""
    return {name: getattr(options, name) for name in ("mesh", "dtype", "cache_dtype")}
