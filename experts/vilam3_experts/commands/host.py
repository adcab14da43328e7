"""`vilam3-experts host`: serve experts over standard input and output."""

from __future__ import annotations

import argparse

from vilam3_experts.calibrate import load_calibration
from vilam3_experts.host import serve_stdio


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("host", help="serve experts over standard input and output")
    parser.add_argument("--weights", help="folder of the model files")
    parser.add_argument("--audit", help="folder of the audit log (default: none)")
    parser.add_argument(
        "--calibration", action="append", default=[], help="file of `calibrate`; repeat for several experts"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return serve_stdio(options.weights, options.audit, [load_calibration(p) for p in options.calibration])
