"""`vilam3-experts export`: label maps as files for viewers."""

from __future__ import annotations

import argparse
import sys

from vilam3_jax.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write label maps as NIfTI or DICOM-SEG",
        description="Writes the label maps of a store for viewers. DICOM-SEG files contain the patient and"
        " study attributes of the source series; NIfTI files and their label tables contain neither.",
    )
    parser.add_argument("--store", required=True, help="annotation store")
    parser.add_argument("--data", required=True, help="the scans: samples folder, or a folder or file")
    parser.add_argument("--out", required=True, help="folder for the files")
    parser.add_argument("--format", choices=("nifti", "dicom-seg"), default="nifti")
    parser.add_argument("--expert", help="only label maps of this expert")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    # Imported here because highdicom takes a second to load.
    from vilam3_experts.export_masks import export_masks

    summary = export_masks(options.store, options.data, options.out, options.format, expert=options.expert)
    for name, file in summary.files:
        print(f"{name}: {file}")
    for name, reason in summary.problems:
        print(f"problem: {name}: {reason}", file=sys.stderr)
    without = f", {summary.without} scans without a label map" if summary.without else ""
    print(f"{len(summary.files)} label maps, {len(summary.problems)} problems{without}; folder {options.out}")
    return 0 if summary.files else UserError.exit_code
