"""`vilam3 data`: look at data sets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vilam3_jax.data import show, stats

_COMMANDS = {"show": show.main, "stats": stats.main}


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 data`."""
    parser = argparse.ArgumentParser(prog="vilam3 data", description="Look at data sets.")
    parser.add_argument(
        "command",
        choices=sorted(_COMMANDS),
        help="show: one example as the model meets it; stats: sizes of samples and how they pack",
    )
    options = parser.parse_args(argv[:1])
    return _COMMANDS[options.command](argv[1:])
