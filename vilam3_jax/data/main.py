"""`vilam3 data`: look at data, before training and as training sees it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# Command → (module with `main(argv) -> int`, what it does for the user). Only the chosen module is imported:
# some need the whole loader.
_COMMANDS = {
    "deidentify": ("vilam3_jax.data.deidentify.main", "copies of DICOM images without identifiers"),
    "leaks": (
        "vilam3_jax.data.leaks.main",
        "images, patients and texts that training and evaluation sets share",
    ),
    "mixture": ("vilam3_jax.data.mixture", "what a run sees: order, epochs and tokens of each dataset"),
    "scan": ("vilam3_jax.data.scan.main", "triage of a folder of DICOM, volumes and pictures"),
    "show": ("vilam3_jax.data.show", "one example as the model meets it"),
    "stats": ("vilam3_jax.data.stats", "sizes of samples and how they pack"),
}


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 data`."""
    parser = argparse.ArgumentParser(prog="vilam3 data", description="Look at datasets.")
    parser.add_argument(
        "command",
        choices=sorted(_COMMANDS),
        help="; ".join(f"{name}: {text}" for name, (_, text) in _COMMANDS.items()),
    )
    options = parser.parse_args(argv[:1])
    return importlib.import_module(_COMMANDS[options.command][0]).main(argv[1:])
