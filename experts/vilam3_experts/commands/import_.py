"""`vilam3-experts import`: turn existing masks into annotations."""

from __future__ import annotations

import argparse
import sys

from vilam3_jax.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "import",
        help="turn existing masks into annotations",
        description="Stores segmentations by tools or people as annotations of their scans: NIfTI, NRRD,"
        " MetaImage, 3D Slicer, MITK and DICOM-SEG. Masks that cannot be used are reported and skipped.",
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
        "--one-file-per-structure", action="store_true", help="each folder is one mask, a file per structure"
    )
    parser.add_argument("--resample", action="store_true", help="resample masks from other grids")
    parser.add_argument(
        "--overlap",
        choices=("refuse", "later"),
        default="refuse",
        help="refuse overlapping structures, or keep the later one",
    )
    parser.add_argument("--keep-empty", action="store_true", help="also store empty masks")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    # Imported here because highdicom takes a second to load.
    from vilam3_experts.imported.run import MaskOrigin, Options, import_masks

    summary = import_masks(
        options.masks,
        options.data,
        options.expert,
        options.out,
        MaskOrigin.parse(options.source),
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
        print(f"{masks} masks with notes on assumptions or omissions: notes-{options.expert}.json")
    print(f"{options.expert}: {summary.line()}; store {options.out}")
    return 0 if summary.counts["imported"] + summary.counts["skipped"] else UserError.exit_code
