"""The `vilam3 data leaks` command."""

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
    """Runs `vilam3 data leaks`; returns 2 if an evaluation record leaked, otherwise 0.

    Raises `UserError` for no datasets, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="vilam3 data leaks",
        description="Finds images, volumes, patients and texts of evaluation sets in training sets. "
        "Identifies records by id only. Exit code 0: no leak; 2: leaks, or bad input.",
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="datasets, or folders of datasets")
    parser.add_argument(
        "--json", metavar="FILE", help=f"report file (default for a single DIR: DIR/{report.REPORT_NAME})"
    )
    parser.add_argument(
        "--training",
        action="append",
        metavar="SPLIT",
        help="training split (default: train), may be repeated; all other splits are evaluation sets",
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=NEAR_DISTANCE,
        metavar="BITS",
        help="maximum Hamming distance between hashes of near images, of 255 bits (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="number of threads (default: one per core)"
    )
    args = parser.parse_args(argv)
    if len(args.directories) > 1 and not args.json:
        raise UserError(
            f"--json FILE: required for several folders; training looks for {report.REPORT_NAME} in data.path"
        )
    if args.workers < 0 or not 0 <= args.distance < 255:
        raise UserError("--workers must not be negative, --distance must be from 0 to 254")
    result = report.find_leaks(
        args.directories, training=args.training or ("train",), distance=args.distance, workers=args.workers
    )
    path = paths.as_path(args.json or paths.as_path(args.directories[0]) / report.REPORT_NAME)
    paths.write_text_atomic(path, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(report.to_text(result))
    report.logger.info("report: %s", path)
    return CLEAN if result["verdict"] == "clean" else LEAKS
