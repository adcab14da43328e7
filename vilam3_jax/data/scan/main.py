"""`vilam3 data scan`: the command."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.scan import report
from vilam3_jax.data.scan.collect import collect
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import write_text_atomic


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 data scan`; returns 0 also where problems were found.

    Raises:
      UserError: no such folder, or an output that cannot be written.
    """
    args = _parser().parse_args(argv)
    if args.workers < 0 or args.max_files < 1:
        raise UserError("--workers must not be negative, --max-files must be positive")
    start = time.monotonic()
    limits = dataclasses.replace(DEFAULT_LIMITS, files=args.max_files)
    found = collect(args.folder, args.workers, limits)
    result = report.to_json(found, time.monotonic() - start)
    text = report.to_text(result)
    if args.json:
        write_text_atomic(args.json, report.dumps(result))
    if args.paths:
        write_text_atomic(args.paths, report.dumps(report.to_paths(found, args.folder)))
        print(
            f"warning: {args.paths} holds names of files and folders, which may identify patients; keep it "
            "where the images are",
            file=sys.stderr,
        )
    sys.stdout.write(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 data scan",
        description="Triage of a folder of DICOM files, volumes and pictures by their headers: which series "
        "there are, which can be used, which not and why. The report names no patient, file or folder.",
    )
    parser.add_argument("folder", help="folder to look at, with its subfolders; local or gs://")
    parser.add_argument("--json", help="FILE for the whole result as JSON")
    parser.add_argument("--paths", help="FILE for the paths behind ids and numbers; it may identify patients")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes (default: one for each core); threads for gs:// (default: 16)",
    )
    parser.add_argument(
        "--max-files",
        type=int,
        default=DEFAULT_LIMITS.files,
        help=f"refuse a folder with more files (default: {DEFAULT_LIMITS.files})",
    )
    return parser
