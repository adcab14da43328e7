"""`vilam3-experts`: run experts over data, list them, check their weights, serve them live."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from vilam3_experts import __version__
from vilam3_experts.commands import (
    annotate,
    audit,
    calibrate,
    compare,
    export,
    host,
    import_,
    list_,
    store,
    weights,
)
from vilam3_jax.errors import UserError, use_one_line_notes

COMMANDS = (annotate, import_, export, calibrate, compare, list_, weights, host, store, audit)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vilam3-experts", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(argv)
    use_one_line_notes()
    # Exit on a scheduler's SIGTERM through the writer, which commits the finished records.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; start again to resume", file=sys.stderr)
        return 130
