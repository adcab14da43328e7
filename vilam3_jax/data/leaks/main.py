"""`vilam3 data leaks`: the command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from vilam3_jax.data.leaks import report
from vilam3_jax.data.leaks.fingerprints import NEAR_DISTANCE
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

CLEAN, LEAKS = 0, 2


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 data leaks`.

    Returns:
      0 where no evaluation record leaked, 2 where one did.

    Raises:
      UserError: no datasets, or an output that cannot be written.
    """
    args = _parser().parse_args(argv)
    if len(args.directories) > 1 and not args.json:
        raise UserError(
            f"--json FILE: needed for several folders; training looks for {report.LEDGER_NAME} in data.path"
        )
    if args.workers < 0 or not 0 <= args.distance < 255:
        raise UserError("--workers must not be negative, --distance must be from 0 to 254")
    content = report.ledger(
        args.directories,
        training=args.training or ("train",),
        distance=args.distance,
        workers=args.workers,
        progress=lambda line: print(line, file=sys.stderr),
    )
    path = paths.as_path(args.json or paths.as_path(args.directories[0]) / report.LEDGER_NAME)
    paths.write_text_atomic(path, json.dumps(content, indent=1) + "\n")
    sys.stdout.write(report.to_text(content))
    print(f"ledger: {path}", file=sys.stderr)
    return CLEAN if content["verdict"] == "clean" else LEAKS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 data leaks",
        description="Looks for images, volumes, patients and texts of evaluation sets in training sets. "
        "Names records by their ids only. Exit code 0: none found; 2: some found, or bad input.",
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="datasets, or folders of datasets")
    parser.add_argument(
        "--json", metavar="FILE", help=f"the ledger (default, for one DIR: DIR/{report.LEDGER_NAME})"
    )
    parser.add_argument(
        "--training",
        action="append",
        metavar="SPLIT",
        help="a split that is trained on (default: train); may be repeated. All others are evaluation sets",
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=NEAR_DISTANCE,
        metavar="BITS",
        help="bits of 255 by which hashes of near images may differ (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="threads (default: one for each core)"
    )
    return parser
