"""`vilam3 data deidentify`: copies of DICOM images without patient identifiers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import tqdm

from vilam3_jax.data.deidentify import run
from vilam3_jax.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 data deidentify",
        description="Copy the DICOM images of a folder without patient identifiers. Text in the "
        "pixels is looked for and listed, not removed. No tool guarantees anonymity: see docs/deidentify.md.",
    )
    parser.add_argument("--source", required=True, help="folder with DICOM files; it is not changed")
    parser.add_argument("--out", required=True, help="new folder for the copies and report.json")
    parser.add_argument(
        "--salt-file",
        help=f"file with a secret of at least {run.MIN_SALT_BYTES} bytes; the same one gives the same "
        "pseudonyms again (default: a random one that is not stored)",
    )
    parser.add_argument(
        "--keep",
        choices=(run.PATIENT_CHARACTERISTICS,),
        help="also keep age (over 89: 90), sex, size and weight, as PS3.15 names this option; SUV needs the "
        "weight",
    )
    parser.add_argument(
        "--refuse-suspects",
        action="store_true",
        help="leave out images that may show identifying text; by default they are copied and listed",
    )
    parser.add_argument(
        "--mapping",
        help="also write a table of source files, copies, PatientIDs and pseudonyms to this file; the table "
        "identifies the patients",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 16),
        help="processes (default: number of cores, at most 16)",
    )
    return parser


def deidentify(args: Any) -> str:
    """Does what `main` promises; returns the text for the terminal.

    Raises:
      UserError: see `run.deidentify`, or a number of workers below 1.
    """
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be positive")
    with tqdm.tqdm(unit=" files", disable=not sys.stderr.isatty()) as progress:
        report = run.deidentify(
            args.source,
            args.out,
            salt_file=args.salt_file,
            keep_characteristics=args.keep == run.PATIENT_CHARACTERISTICS,
            refuse_suspects=args.refuse_suspects,
            mapping=args.mapping,
            workers=args.workers,
            tick=progress.update,
        )
    files = report["files"]
    lines = [
        f"{files['written']} of {files['seen']} files written: {report['patients']} patients, "
        f"{report['studies']} studies, {report['series']} series"
    ]
    lines += [f"  skipped {count}: {reason}" for reason, count in report["skipped"].items()]
    if files["suspected of burned-in text"]:
        lines.append(
            f"  {files['suspected of burned-in text']} may show identifying text: look at them "
            f"({run.REPORT_NAME}, suspects)"
        )
    if args.salt_file is None:
        lines.append("  the random salt was not stored: another run gives other pseudonyms")
    if args.mapping is not None:
        lines.append(f"  {args.mapping} identifies the patients: keep it apart from the copies")
    lines.append(f"report: {os.path.join(args.out, run.REPORT_NAME)}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vilam3 data deidentify`; returns the exit code (2: bad input, said in one line)."""
    args = _parser().parse_args(argv)
    try:
        sys.stdout.write(deidentify(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
