"""The `vilam3 data scan` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.scan import report
from vilam3_jax.data.scan.collect import collect
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import write_text_atomic


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 data scan`; returns 0 even if files have problems.

    Raises `UserError` if the folder does not exist or an output cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="vilam3 data scan",
        description="Triage of a folder of DICOM files, volumes and images from their headers: its series, "
        "which are usable, and why the others are not. The report names no patient, file or folder.",
    )
    parser.add_argument("folder", help="folder to scan recursively; local or gs://")
    parser.add_argument("--json", help="FILE for the complete result as JSON")
    parser.add_argument("--paths", help="FILE that maps ids and numbers to paths; it may identify patients")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="number of processes (default: one per core), or of threads for gs:// (default: 16)",
    )
    parser.add_argument(
        "--max-files",
        type=int,
        default=DEFAULT_LIMITS.files,
        help="refuse folders with more files than this (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.workers < 0 or args.max_files < 1:
        raise UserError("--workers must not be negative, --max-files must be positive")
    start = time.monotonic()
    scanned = collect(args.folder, args.workers, dataclasses.replace(DEFAULT_LIMITS, files=args.max_files))
    result = report.to_json(scanned, time.monotonic() - start)
    if args.json:
        write_text_atomic(args.json, json.dumps(result, indent=1) + "\n")
    if args.paths:
        named = report.to_paths(scanned, args.folder)
        # ASCII: escapes preserve file names that are not valid Unicode.
        write_text_atomic(args.paths, json.dumps(named, indent=1) + "\n")
        print(
            f"warning: {args.paths} contains file and folder names, which may identify patients; store it "
            "with the images",
            file=sys.stderr,
        )
    sys.stdout.write(report.to_text(result))
    return 0
