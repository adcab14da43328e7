"""`vilam3-experts host`: serve experts over standard input and output."""

from __future__ import annotations

import argparse
import os
import sys

from vilam3_experts.calibrate import load_calibration
from vilam3_experts.host import serve


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("host", help="serve experts over standard input and output")
    parser.add_argument("--weights", help="folder of the model files")
    parser.add_argument("--audit", help="folder of the audit log (default: none)")
    parser.add_argument(
        "--calibration", action="append", default=[], help="file of `calibrate`; repeat for several experts"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    calibrations = [load_calibration(path) for path in options.calibration]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that libraries print goes to standard error
    with answers:
        return serve(options.weights, sys.stdin.buffer, answers, options.audit, calibrations)
