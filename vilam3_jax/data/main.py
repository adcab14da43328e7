"""The `vilam3 data` command: inspect and clean data."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# Command -> (module with `main(argv) -> int`, description). Only the selected module is imported, as some
# modules import the whole loader.
_COMMANDS = {
    "check": ("vilam3_jax.data.preflight", "checks what a run would read before it is started"),
    "deidentify": ("vilam3_jax.data.deidentify.main", "copies DICOM images without identifiers"),
    "leaks": ("vilam3_jax.data.leaks.main", "finds records shared by training and evaluation sets"),
    "mixture": ("vilam3_jax.data.mixture", "shows order, epochs and tokens of each dataset in a run"),
    "scan": ("vilam3_jax.data.scan.main", "triage of a folder of DICOM files, volumes and images"),
    "show": ("vilam3_jax.data.show", "shows one example as the model reads it"),
    "stats": ("vilam3_jax.data.stats", "shows sample sizes and how samples are packed"),
}


def main(argv: Sequence[str]) -> int:
    """Runs a `vilam3 data` command."""
    parser = argparse.ArgumentParser(prog="vilam3 data", description="Inspect and clean data.")
    parser.add_argument(
        "command",
        choices=sorted(_COMMANDS),
        help="; ".join(f"{name}: {text}" for name, (_, text) in _COMMANDS.items()),
    )
    options = parser.parse_args(argv[:1])
    return importlib.import_module(_COMMANDS[options.command][0]).main(argv[1:])
