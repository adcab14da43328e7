"""`vilam3-experts import`: masks of any tool, or of people, become annotations."""

from __future__ import annotations

import argparse
import sys

from vilam3_jax.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "import",
        help="turn existing masks into annotations",
        description="Stores segmentations that a tool or people made as annotations of their scans: NIfTI,"
        " NRRD, MetaImage, 3D Slicer, MITK and DICOM-SEG. Masks that cannot be used are named and left out.",
    )
    parser.add_argument(
        "--masks", required=True, nargs="+", help="files or folders of masks, or a samples folder"
    )
    parser.add_argument("--data", required=True, help="samples folder, or a folder or file of scans")
    parser.add_argument("--expert", required=True, help="name to store them under, such as ORGANS")
    parser.add_argument("--out", required=True, help="annotation store, local or gs://")
    parser.add_argument(
        "--source", required=True, help="who made them: 'tool:NAME VERSION' or 'ground-truth:WHO'"
    )
    parser.add_argument("--labels", help="label table; FILE#KEY for one of several (default: the masks' own)")
    parser.add_argument("--args", nargs="+", default=(), help="the expert's arguments (default: its first)")
    parser.add_argument("--manifest", help="CSV or JSON with the scan of each mask (columns scan and mask)")
    parser.add_argument(
        "--one-file-per-structure", action="store_true", help="each folder is a mask, a file per structure"
    )
    parser.add_argument("--resample", action="store_true", help="resample masks that lie on another grid")
    parser.add_argument(
        "--overlap", choices=("refuse", "later"), default="refuse", help="which of two overlapping structures"
    )
    parser.add_argument("--keep-empty", action="store_true", help="store masks that mark nothing, too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    # Here, because highdicom takes a second that other commands need not wait for.
    from vilam3_experts.imported.run import Options, Source, import_masks

    summary = import_masks(
        options.masks,
        options.data,
        options.expert,
        options.out,
        Source.parse(options.source),
        Options(
            labels=options.labels,
            args=tuple(options.args),
            manifest=options.manifest,
            per_structure=options.one_file_per_structure,
            resample=options.resample,
            later_wins=options.overlap == "later",
            keep_empty=options.keep_empty,
        ),
    )
    for name, reason in summary.problems:
        print(f"problem: {name}: {reason}", file=sys.stderr)
    if summary.notes:
        masks = len({name for name, _ in summary.notes})
        print(f"{masks} masks with notes on what was assumed or left out: notes-{options.expert}.json")
    print(f"{options.expert}: {summary.line()}; store {options.out}")
    return 0 if summary.counts["imported"] + summary.counts["skipped"] else UserError.exit_code
