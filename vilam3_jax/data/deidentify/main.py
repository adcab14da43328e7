"""The `vilam3 data deidentify` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import tqdm

from vilam3_jax.data.deidentify import run
from vilam3_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 data deidentify`; returns 0, or raises as `run.deidentify`."""
    parser = argparse.ArgumentParser(
        prog="vilam3 data deidentify",
        description="Copies the DICOM images of a folder without patient identifiers. Text in the pixels is "
        "detected and listed, not removed. No tool guarantees anonymity: see docs/deidentify.md.",
    )
    parser.add_argument("--source", required=True, help="folder with DICOM files; not modified")
    parser.add_argument("--out", required=True, help="new folder for the copies and report.json")
    parser.add_argument(
        "--salt-file",
        help=f"file with a secret of at least {run.MIN_SALT_BYTES} bytes; the same secret reproduces the "
        "pseudonyms (default: a random one that is not stored)",
    )
    parser.add_argument(
        "--keep",
        choices=(run.PATIENT_CHARACTERISTICS,),
        help="also keep age (above 89: 90), sex, size and weight (a PS3.15 option); SUV requires the weight",
    )
    parser.add_argument(
        "--refuse-suspects",
        action="store_true",
        help="skip images that may show identifying text; by default they are copied and listed",
    )
    parser.add_argument(
        "--mapping",
        help="also write a table of source files, copies, PatientIDs and pseudonyms to this file; it "
        "identifies the patients",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 16),
        help="number of processes (default: one per core, at most 16)",
    )
    args = parser.parse_args(argv)
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
    if suspects := files["suspected of burned-in text"]:
        lines.append(f"  {suspects} may show identifying text: inspect them (suspects in {run.REPORT_NAME})")
    if args.salt_file is None:
        lines.append("  the random salt was not stored: another run gives other pseudonyms")
    if args.mapping is not None:
        lines.append(f"  {args.mapping} identifies the patients: store it apart from the copies")
    print("\n".join([*lines, f"report: {os.path.join(args.out, run.REPORT_NAME)}"]))
    return 0
